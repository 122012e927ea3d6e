"""A constant stream of requests to one alias, and a report of the answers: it observes a hot-swap."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from openai import AsyncOpenAI, OpenAIError

from examples.openai_clients import async_openai_client

_ANSWER_TIMEOUT_S = 180


@dataclass(frozen=True)
class Answer:
    """One request as its caller saw it; times in seconds since the traffic began."""

    began_s: float
    ended_s: float
    revisions: frozenset[str]  # every `model` that its chunks named
    text: str
    error: str | None = None
    first_s: float | None = None  # when its first token came; None where that was not measured


@dataclass
class Traffic:
    """`workers` callers. Every second one streams, and each sends its next request as soon as it has its answer."""

    url: str
    model: str
    question: str
    workers: int = 6
    max_tokens: int = 20
    answers: list[Answer] = field(default_factory=list)
    _began: float = field(default_factory=time.monotonic)
    _stopping: bool = False
    _answered: asyncio.Event = field(default_factory=asyncio.Event)

    def now(self) -> float:
        return time.monotonic() - self._began

    async def answered(self, count: int, since_s: float = 0) -> None:
        """Return when `count` requests that began after `since_s` are answered. Raises TimeoutError."""
        async with asyncio.timeout(_ANSWER_TIMEOUT_S):
            while sum(answer.began_s > since_s and answer.error is None for answer in self.answers) < count:
                self._answered.clear()
                await self._answered.wait()

    def stop(self) -> None:
        """Let every caller finish its request, and send no more."""
        self._stopping = True

    async def run(self) -> None:
        """Send requests until `stop`. Nothing is retried, so that every failed request is counted."""
        async with async_openai_client(self.url) as client:
            await asyncio.gather(*(self._worker(client, number % 2 == 0) for number in range(self.workers)))

    async def _worker(self, client: AsyncOpenAI, stream: bool) -> None:
        ask = self._ask_streaming if stream else self._ask
        while not self._stopping:
            began = self.now()
            try:
                revisions, text = await ask(client)
                self.answers.append(Answer(began, self.now(), revisions, text))
            except OpenAIError as error:
                self.answers.append(Answer(began, self.now(), frozenset(), "", repr(error)))
                await asyncio.sleep(0.1)
            self._answered.set()

    def _request(self) -> dict[str, object]:
        messages = [{"role": "user", "content": self.question}]
        return {"model": self.model, "messages": messages, "max_tokens": self.max_tokens, "temperature": 0}

    async def _ask(self, client: AsyncOpenAI) -> tuple[frozenset[str], str]:
        completion = await client.chat.completions.create(**self._request())  # type: ignore[call-overload]
        return frozenset({completion.model}), completion.choices[0].message.content or ""

    async def _ask_streaming(self, client: AsyncOpenAI) -> tuple[frozenset[str], str]:
        revisions, pieces = set(), []
        stream = await client.chat.completions.create(**self._request(), stream=True)  # type: ignore[call-overload]
        async for chunk in stream:
            revisions.add(chunk.model)
            pieces += [choice.delta.content or "" for choice in chunk.choices]
        return frozenset(revisions), "".join(pieces)


@dataclass
class RevisionInterval:
    """The time in which an alias could mean one revision only, in seconds since the traffic began.

    It lasts from the end of the revision's publish to the begin of the next publish.
    """

    revision: str
    since_s: float
    until_s: float = math.inf

    def covers(self, answer: Answer) -> bool:
        """Whether the request began and ended within the interval."""
        return self.since_s < answer.began_s and answer.ended_s < self.until_s


@dataclass(frozen=True)
class SwapReport:
    """What callers observed of a sequence of swaps."""

    requests: int
    failed: int
    mixed: int  # answers that name two revisions, or whose text is not the one of the revision they name
    stale: int  # answers within an interval that came from another revision
    answers_by_interval: tuple[int, ...]  # answers within each interval

    @property
    def is_clean(self) -> bool:
        """Whether nothing went wrong, and each interval has an answer that shows it."""
        return not (self.failed or self.mixed or self.stale) and all(self.answers_by_interval)

    @classmethod
    def of(
        cls, answers: list[Answer], intervals: list[RevisionInterval], belongs: Callable[[str, str], bool]
    ) -> SwapReport:
        """`belongs(revision, text)`: whether that text is an answer of that revision."""
        good = [answer for answer in answers if answer.error is None]
        within = [[answer for answer in good if interval.covers(answer)] for interval in intervals]
        return cls(
            requests=len(answers),
            failed=len(answers) - len(good),
            mixed=sum(not _is_pure(answer, belongs) for answer in good),
            stale=sum(
                interval.revision not in answer.revisions
                for interval, covered in zip(intervals, within, strict=True)
                for answer in covered
            ),
            answers_by_interval=tuple(len(covered) for covered in within),
        )


def _is_pure(answer: Answer, belongs: Callable[[str, str], bool]) -> bool:
    return len(answer.revisions) == 1 and belongs(next(iter(answer.revisions)), answer.text)
