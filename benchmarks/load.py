"""A closed-loop load: callers that send the next request as soon as they have an answer."""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import httpx

from examples.traffic import Answer
from serve.follower.http_client import direct_async_client

_TIMEOUT_S = 120


@asynccontextmanager
async def http_client() -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=None)
    async with direct_async_client(timeout=_TIMEOUT_S, limits=limits) as client:
        yield client


async def ask(
    client: httpx.AsyncClient, url: str, model: str, prompt: str | Sequence[int], max_tokens: int, zero_s: float
) -> Answer:
    """One streamed completion, with times in seconds since `zero_s`. An error is a part of the answer, not raised."""
    began = time.monotonic() - zero_s
    request = {
        "model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": True,
        "ignore_eos": True,
    }  # fmt: skip
    first: float | None = None
    revisions, texts = set(), []
    try:
        async with client.stream("POST", f"{url}/v1/completions", json=request) as response:
            if response.status_code != 200:
                return Answer(began, time.monotonic() - zero_s, frozenset(), "", f"status {response.status_code}")
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    first = first or time.monotonic() - zero_s
                    chunk = json.loads(line[6:])
                    revisions.add(chunk["model"])
                    texts += [choice["text"] for choice in chunk["choices"]]
    except httpx.HTTPError as error:
        return Answer(began, time.monotonic() - zero_s, frozenset(), "", repr(error))
    return Answer(began, time.monotonic() - zero_s, frozenset(revisions), "".join(texts), None, first)


@dataclass
class ClosedLoopLoad:
    """`workers` callers without a pause between requests. Caller n sends to `urls[n]` for `models[n]`; both lists
    repeat as often as needed."""

    client: httpx.AsyncClient
    urls: Sequence[str]
    models: Sequence[str]
    prompt: str
    workers: int
    max_tokens: int
    answers: list[Answer] = field(default_factory=list)
    zero_s: float = field(default_factory=time.monotonic)
    _stopping: bool = False
    _answered: asyncio.Event = field(default_factory=asyncio.Event)

    def now(self) -> float:
        return time.monotonic() - self.zero_s

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with asyncio.TaskGroup() as group:
            targets = zip(range(self.workers), itertools.cycle(self.urls), itertools.cycle(self.models))
            for _, url, model in targets:
                group.create_task(self._caller(url, model))
            yield
            self._stopping = True

    async def answered(self, count: int, since_s: float) -> None:
        """Return when `count` requests that began after `since_s` were answered. Raises TimeoutError."""
        async with asyncio.timeout(_TIMEOUT_S):
            while sum(answer.began_s > since_s and answer.error is None for answer in self.answers[-1000:]) < count:
                self._answered.clear()
                await self._answered.wait()

    async def _caller(self, url: str, model: str) -> None:
        while not self._stopping:
            answer = await ask(self.client, url, model, self.prompt, self.max_tokens, self.zero_s)
            self.answers.append(answer)
            self._answered.set()
            if answer.error:
                await asyncio.sleep(0.05)


def first_token_s(answers: Sequence[Answer]) -> list[float]:
    """Seconds to the first token, of the answers that have one."""
    return [answer.first_s - answer.began_s for answer in answers if answer.first_s is not None]


def p99(samples: Sequence[float]) -> float:
    return statistics.quantiles(samples, n=100)[98]
