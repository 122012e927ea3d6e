"""Callers who never stop asking: python -m tests.e2e.nodes.load URL MODEL… prints what became of it, on SIGTERM."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, field

import httpx

CALLERS = 6
_TOKENS = 24


@dataclass
class Outcome:
    """`failed` requests had no answer; an error within a stream that had begun counts too."""

    answered: int = 0
    failed: list[dict[str, object]] = field(default_factory=list)
    slowest_s: float = 0


async def ask(client: httpx.AsyncClient, model: str, stream: bool) -> None:
    """One request. Raises httpx.HTTPError or ValueError if its answer is not whole."""
    body = {"model": model, "prompt": "the rain in spain", "max_tokens": _TOKENS, "temperature": 0, "ignore_eos": True}
    if not stream:
        answer = await client.post("/v1/completions", json=body)
        answer.raise_for_status()
        if answer.json()["usage"]["completion_tokens"] != _TOKENS:
            raise ValueError(f"cut short: {answer.text}")
        return
    last = ""
    async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
        if answer.is_error:
            await answer.aread()
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            last = line or last
    if last != "data: [DONE]":
        raise ValueError(f"ended with {last!r}")


async def call(client: httpx.AsyncClient, models: list[str], number: int, stopping: asyncio.Event, to: Outcome) -> None:
    stream = number % 2 == 0
    while not stopping.is_set():
        number += 1
        began = time.monotonic()
        try:
            await ask(client, models[number % len(models)], stream)
            to.answered += 1
            to.slowest_s = max(to.slowest_s, time.monotonic() - began)
        except (httpx.HTTPError, ValueError, KeyError) as error:
            body = error.response.text if isinstance(error, httpx.HTTPStatusError) else ""
            to.failed.append({"stream": stream, "error": repr(error)[:300], "body": body[:300]})
            await asyncio.sleep(0.05)


async def main(url: str, models: list[str]) -> None:
    stopping, outcome = asyncio.Event(), Outcome()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    headers = {"authorization": f"Bearer {os.environ['GRAFT_KEY']}"}
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=60) as client:
        await asyncio.gather(*(call(client, models, number, stopping, outcome) for number in range(CALLERS)))
    print(json.dumps(asdict(outcome)))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2:]))
