"""How many tokens the text of a request's body gives, measured with the engine's own tokenizer and chat template."""

from __future__ import annotations

from dataclasses import dataclass

import httpx
import msgspec
from starlette.types import ASGIApp

# Code needs more tokens a byte than prose: what needs most is the measure.
_PROSE = """I ordered two chairs and a lamp on Monday, but only the chairs were in the parcel that came this morning.
Is the lamp on its way, or did somebody forget it? If you can't find it, I would like my money back. Thank you!"""
_CODE = """What is wrong here?

class Cache:
    def __init__(self, size_bytes: int = 1 << 20) -> None:
        self._items: dict[str, bytes] = {}

    def get(self, key: str) -> bytes | None:
        for name, value in self._items.items():
            if name == key and len(value) <= 4096:
                return value
        raise KeyError(f"{key!r} is not one of {len(self._items)} items")
"""


@dataclass(frozen=True)
class PromptSize:
    """`tokens_per_byte`: of a body; `template_tokens`: that the chat template adds to an empty message."""

    tokens_per_byte: float
    template_tokens: int


async def measure(api: ASGIApp) -> PromptSize:
    """Asks the engine's application. Without a tokenizer every byte counts as a token, which is an upper bound; without
    a chat template, which chats need, it adds nothing."""
    transport = httpx.ASGITransport(api, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://engine") as client:
        bodies = [msgspec.json.encode(_chat(text)) for text in (_PROSE, _CODE)]
        densities = [(await _count(client, {"prompt": body.decode()}) or len(body)) / len(body) for body in bodies]
        return PromptSize(max(densities), await _count(client, _chat("")) or 0)


def _chat(text: str) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": text}]}


async def _count(client: httpx.AsyncClient, body: object) -> int | None:
    response = await client.post("/tokenize", json=body)
    return int(response.json()["count"]) if response.status_code == 200 else None
