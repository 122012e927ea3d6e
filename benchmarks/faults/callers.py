"""Callers that send requests without a pause and compare each answer with the expected text of its revision."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import httpx

from serve.follower.http_client import direct_async_client

PROMPT = "the rain in spain"
MAX_TOKENS = 12
HUNG_AFTER_S = 5.0
_GIVE_UP_AFTER_S = 60.0
_RETRYABLE = frozenset({429, 502, 503, 504})
_PAUSE_AFTER_FAILURE_S = 0.2

# answered: complete, with the text of its revision. refused: an error in the API's format that may be retried, or the
# 404 of a model that was removed.
# broken: the connection ended before the answer did. unclear: any other error. wrong: not the text of the revision, or
# a revision that the requested name never pointed to. hung: nothing arrived within HUNG_AFTER_S, or no complete answer
# within _GIVE_UP_AFTER_S.
Outcome = Literal["answered", "refused", "broken", "unclear", "wrong", "hung"]


@dataclass(frozen=True)
class RequestResult:
    """One request and its outcome; times in seconds since the load began."""

    model: str
    stream: bool
    began_s: float
    ended_s: float
    outcome: Outcome
    detail: str = ""  # of an outcome other than answered
    first_s: float | None = None  # first event of a stream

    @property
    def waited_s(self) -> float:
        """Seconds until the first event of a stream, or until the end."""
        return (self.ended_s if self.first_s is None else self.first_s) - self.began_s

    def judged(self, hung_after_s: float) -> RequestResult:
        """The same request, which counts as hung if it waited longer."""
        if self.waited_s <= hung_after_s or self.outcome == "wrong":
            return self
        later = self.detail or "the answer"
        return replace(self, outcome="hung", detail=f"nothing for {self.waited_s:.1f} s, then {later}")


@dataclass
class ExpectedAnswers:
    """The text of every revision, and the revisions that a name has pointed to."""

    texts: dict[str, str] = field(default_factory=dict)
    names: dict[str, set[str]] = field(default_factory=dict)
    removed: set[str] = field(default_factory=set)  # models that are not served at the moment: a 404 is right

    def is_correct(self, model: str, answering_model: str, text: str) -> bool:
        return answering_model in self.names.get(model, {model}) and self.texts.get(answering_model) == text


@dataclass
class Callers:
    """`workers` concurrent callers; every other request streams. Each request opens a connection of its own, because
    the proxy chooses the replica for each connection."""

    url: str
    key: str
    base: str
    expected: ExpectedAnswers
    workers: int = 6
    results: list[RequestResult] = field(default_factory=list)
    zero_s: float = field(default_factory=time.monotonic)
    _stopping: bool = False

    def now(self) -> float:
        return time.monotonic() - self.zero_s

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with asyncio.TaskGroup() as group:
            for number in range(self.workers):
                group.create_task(self._ask_repeatedly(number))
            try:
                yield
            finally:
                self._stopping = True

    def between(self, began_s: float, ended_s: float) -> list[RequestResult]:
        """The requests that were running at any time in this interval."""
        return [result for result in self.results if result.ended_s > began_s and result.began_s < ended_s]

    def model(self, turn: int) -> str:
        """The base model and every adapter name in turn."""
        names = [self.base, *self.expected.names]
        return names[turn % len(names)]

    async def _ask_repeatedly(self, number: int) -> None:
        for turn in itertools.count(number):
            if self._stopping:
                return
            result = await self.ask(self.model(turn), stream=turn % 2 == 0)
            self.results.append(result)
            if result.outcome != "answered":
                await asyncio.sleep(_PAUSE_AFTER_FAILURE_S)

    async def ask(self, model: str, stream: bool) -> RequestResult:
        """Send one request. Every error becomes an outcome; nothing is raised."""
        began, first = self.now(), list[float]()
        outcome: Outcome
        try:
            async with asyncio.timeout(_GIVE_UP_AFTER_S), client_of(self.url, self.key) as client:
                outcome, detail = await self._send(client, model, stream, first)
        except TimeoutError:
            outcome, detail = "hung", f"no complete answer after {_GIVE_UP_AFTER_S:g} s"
        except httpx.HTTPError as error:
            outcome, detail = "broken", repr(error)
        return RequestResult(model, stream, began, self.now(), outcome, detail, first[0] if first else None)

    async def _send(
        self, client: httpx.AsyncClient, model: str, stream: bool, first: list[float]
    ) -> tuple[Outcome, str]:
        body = request(model) | {"stream": stream}
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.is_error:
                outcome, detail = classify_error(response.status_code, await response.aread())
                is_removed = model in self.expected.removed and response.status_code == 404
                return ("refused" if is_removed else outcome), detail
            if not stream:
                document = json.loads(await response.aread())
                return self._compare(model, document["model"], document["choices"][0]["text"])
            return await self._read_stream(model, response, first)

    async def _read_stream(self, model: str, response: httpx.Response, first: list[float]) -> tuple[Outcome, str]:
        names, texts = set[str](), list[str]()
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                return self._compare(model, " and ".join(sorted(names)), "".join(texts))
            if not line.startswith("data: "):
                continue
            first.append(self.now())
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                return ("refused" if chunk["error"].get("message") else "unclear"), line
            names.add(chunk["model"])
            texts += [choice["text"] for choice in chunk["choices"]]
        return "broken", "the stream ended without [DONE]"

    def _compare(self, model: str, answering_model: str, text: str) -> tuple[Outcome, str]:
        if self.expected.is_correct(model, answering_model, text):
            return "answered", ""
        return "wrong", f"asked {model}, {answering_model} said {text!r}"


def client_of(url: str, key: str) -> httpx.AsyncClient:
    """A client for one request, so that closing it closes the connection."""
    return direct_async_client(base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=2 * _GIVE_UP_AFTER_S)


def request(model: str) -> dict[str, Any]:
    return {"model": model, "prompt": PROMPT, "max_tokens": MAX_TOKENS, "temperature": 0, "ignore_eos": True}


def classify_error(status: int, body: bytes) -> tuple[Outcome, str]:
    """`refused` for a retryable status with an error in the API's format, else `unclear`."""
    detail = f"{status} {body[:200].decode(errors='replace')}"
    try:
        has_api_format = bool(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        has_api_format = False
    return ("refused" if has_api_format and status in _RETRYABLE else "unclear"), detail


def count_outcomes(results: Sequence[RequestResult]) -> dict[str, int]:
    return dict(Counter(result.outcome for result in results))
