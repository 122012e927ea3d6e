"""A constant stream of requests to one alias, and what came back: the witness of a hot-swap."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from openai import AsyncOpenAI, OpenAIError

_ANSWER_TIMEOUT_S = 180


@dataclass(frozen=True)
class Answer:
    """One request as its caller saw it; times in seconds since the traffic began."""

    began_s: float
    ended_s: float
    revisions: frozenset[str]  # every `model` that its chunks named
    text: str
    error: str | None = None
    first_s: float | None = None  # when its first token came, where that was looked at


@dataclass
class Traffic:
    """`workers` callers, every second one streaming, each asking again as soon as it has its answer."""

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
        """Return when so many requests that began after `since_s` were answered. Raises TimeoutError."""
        async with asyncio.timeout(_ANSWER_TIMEOUT_S):
            while sum(it.began_s > since_s and it.error is None for it in self.answers) < count:
                self._answered.clear()
                await self._answered.wait()

    def stop(self) -> None:
        """Let every caller have its last answer."""
        self._stopping = True

    async def run(self) -> None:
        """Until `stop`. No retries: a request that fails is seen as failed."""
        async with AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
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
class Reign:
    """The time in which an alias could mean one revision only: from the end of its publish to the begin of the
    next one; seconds since the traffic began."""

    revision: str
    since_s: float
    until_s: float = math.inf

    def covers(self, answer: Answer) -> bool:
        """Whether the request began and ended within it."""
        return self.since_s < answer.began_s and answer.ended_s < self.until_s


@dataclass(frozen=True)
class SwapReport:
    """What callers saw of a sequence of swaps."""

    requests: int
    failed: int
    mixed: int  # answers that name two revisions, or whose text is not the one of the revision they name
    stale: int  # answers within a reign by another revision
    by_reign: tuple[int, ...]  # answers within each reign

    @property
    def is_clean(self) -> bool:
        """Nothing wrong, and enough seen to say so."""
        return not (self.failed or self.mixed or self.stale) and all(self.by_reign)

    @classmethod
    def of(cls, answers: list[Answer], reigns: list[Reign], belongs: Callable[[str, str], bool]) -> SwapReport:
        """`belongs(revision, text)`: whether that revision would say that."""
        good = [answer for answer in answers if answer.error is None]
        within = [[answer for answer in good if reign.covers(answer)] for reign in reigns]
        return cls(
            requests=len(answers),
            failed=len(answers) - len(good),
            mixed=sum(not _is_pure(answer, belongs) for answer in good),
            stale=sum(
                reign.revision not in answer.revisions
                for reign, covered in zip(reigns, within, strict=True)
                for answer in covered
            ),
            by_reign=tuple(len(covered) for covered in within),
        )


def _is_pure(answer: Answer, belongs: Callable[[str, str], bool]) -> bool:
    return len(answer.revisions) == 1 and belongs(next(iter(answer.revisions)), answer.text)
