"""Callers who never stop asking, know what every revision says, and tell what became of each request."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx

PROMPT = "the rain in spain"
MAX_TOKENS = 12
HUNG_S = 60.0
_RETRYABLE = frozenset({429, 502, 503, 504})
_AFTER_A_FAILURE_S = 0.2

# answered: whole, and what that revision says. refused: an error that says to try again, in the API's form.
# broken: the connection ended before the answer did. unclear: any other error. wrong: another text than the
# revision's, or a revision that the name never meant. hung: nothing came for a minute.
Outcome = Literal["answered", "refused", "broken", "unclear", "wrong", "hung"]


@dataclass(frozen=True)
class Asked:
    """One request; times in seconds since the load began."""

    model: str
    stream: bool
    began_s: float
    ended_s: float
    outcome: Outcome
    told: str = ""  # what was wrong
    first_s: float | None = None


@dataclass
class Said:
    """What is right: the text of every revision, and which of them a name may mean."""

    texts: dict[str, str] = field(default_factory=dict)
    names: dict[str, set[str]] = field(default_factory=dict)

    def is_right(self, model: str, told_model: str, text: str) -> bool:
        return told_model in self.names.get(model, {model}) and self.texts.get(told_model) == text


@dataclass
class Callers:
    """`workers` of them, half of them streaming. Each request has a connection of its own, so that the proxy sends
    every caller to every replica in turn."""

    url: str
    key: str
    base: str
    said: Said
    workers: int = 6
    asked: list[Asked] = field(default_factory=list)
    zero_s: float = field(default_factory=time.monotonic)
    _stopping: bool = False

    def now(self) -> float:
        return time.monotonic() - self.zero_s

    @asynccontextmanager
    async def asking(self) -> AsyncIterator[None]:
        async with asyncio.TaskGroup() as group:
            for number in range(self.workers):
                group.create_task(self._ask_on(number))
            try:
                yield
            finally:
                self._stopping = True

    def between(self, began_s: float, ended_s: float) -> list[Asked]:
        """Those that ran at any time between."""
        return [it for it in self.asked if it.ended_s > began_s and it.began_s < ended_s]

    def model(self, turn: int) -> str:
        """The base and every name, one after the other."""
        names = [self.base, *self.said.names]
        return names[turn % len(names)]

    async def _ask_on(self, number: int) -> None:
        for turn in itertools.count(number):
            if self._stopping:
                return
            asked = await self.ask(self.model(turn), stream=turn % 2 == 0)
            self.asked.append(asked)
            if asked.outcome != "answered":
                await asyncio.sleep(_AFTER_A_FAILURE_S)

    async def ask(self, model: str, stream: bool) -> Asked:
        """One request. Whatever happens is an outcome."""
        began, first = self.now(), list[float]()
        outcome: Outcome
        try:
            async with asyncio.timeout(HUNG_S), client_of(self.url, self.key) as client:
                outcome, told = await self._answer(client, model, stream, first)
        except TimeoutError:
            outcome, told = "hung", f"nothing for {HUNG_S:g} s"
        except httpx.HTTPError as error:
            outcome, told = "broken", repr(error)
        return Asked(model, stream, began, self.now(), outcome, told, first[0] if first else None)

    async def _answer(
        self, client: httpx.AsyncClient, model: str, stream: bool, first: list[float]
    ) -> tuple[Outcome, str]:
        body = request(model) | {"stream": stream}
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.is_error:
                return failure(response.status_code, await response.aread())
            if not stream:
                document = json.loads(await response.aread())
                return self._judge(model, document["model"], document["choices"][0]["text"])
            return await self._streamed(model, response, first)

    async def _streamed(self, model: str, response: httpx.Response, first: list[float]) -> tuple[Outcome, str]:
        names, pieces = set[str](), list[str]()
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                return self._judge(model, " and ".join(sorted(names)), "".join(pieces))
            if not line.startswith("data: "):
                continue
            first.append(self.now())
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                return ("refused" if chunk["error"].get("message") else "unclear"), line
            names.add(chunk["model"])
            pieces += [choice["text"] for choice in chunk["choices"]]
        return "broken", "the stream ended without [DONE]"

    def _judge(self, model: str, told_model: str, text: str) -> tuple[Outcome, str]:
        if self.said.is_right(model, told_model, text):
            return "answered", ""
        return "wrong", f"asked {model}, {told_model} said {text!r}"


def client_of(url: str, key: str) -> httpx.AsyncClient:
    """For one request: what it opens is closed with it."""
    return httpx.AsyncClient(base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=2 * HUNG_S)


def request(model: str) -> dict[str, Any]:
    return {"model": model, "prompt": PROMPT, "max_tokens": MAX_TOKENS, "temperature": 0, "ignore_eos": True}


def failure(status: int, body: bytes) -> tuple[Outcome, str]:
    """An error of the API's form that may be tried again is clear; everything else is not."""
    told = f"{status} {body[:200].decode(errors='replace')}"
    try:
        is_shaped = bool(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        is_shaped = False
    return ("refused" if is_shaped and status in _RETRYABLE else "unclear"), told


def counted(asked: Sequence[Asked]) -> dict[str, int]:
    return dict(Counter(it.outcome for it in asked))
