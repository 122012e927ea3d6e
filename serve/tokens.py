"""Tokens of the request that is being answered, counted where the engine makes them.

Whoever answers a request puts a counter into the context; the engine, called from somewhere inside, adds to it. So
streams are counted as well, and the answer is not looked at.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any


@dataclass
class Tokens:
    """What one request has used so far."""

    prompt: int = 0
    completion: int = 0

    @property
    def total(self) -> int:
        return self.prompt + self.completion


_counter: ContextVar[Tokens | None] = ContextVar("tokens", default=None)


@contextmanager
def counting() -> Iterator[Tokens]:
    """Counts what is generated inside, tasks that are started inside included."""
    tokens = Tokens()
    before = _counter.set(tokens)
    try:
        yield tokens
    finally:
        _counter.reset(before)


def counter() -> Tokens | None:
    """None if nobody counts."""
    return _counter.get()


async def adding(answers: AsyncGenerator[Any, None], tokens: Tokens, deltas: bool) -> AsyncGenerator[Any, None]:
    """The answers of one generation as they are, which are vLLM's: each with the prompt's tokens, and for each sequence
    those that it has so far, or the new ones if they are `deltas`; or a vector."""
    seen: dict[int, int] | None = None
    # Closed with this one, at once: that is how the engine learns that nobody reads on.
    async with contextlib.aclosing(answers):
        async for answer in answers:
            if seen is None:
                seen = {}
                tokens.prompt += len(answer.prompt_token_ids or ())
            if isinstance(answer.outputs, list):
                for output in answer.outputs:
                    made = len(output.token_ids)
                    tokens.completion += made if deltas else made - seen.get(output.index, 0)
                    seen[output.index] = made
            yield answer
