"""Tokens of the request that is being answered, counted where the engine makes them.

Whoever answers a request puts a counter into the context; the engine, called from somewhere inside, adds to it. So
streams are counted as well, and the answer is not looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


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


def step(tokens: Tokens, deltas: bool) -> Callable[[int, int, int], None]:
    """For the outputs of one generation: call it with the length of the prompt, the index of a sequence and how many
    of its tokens the output holds; `deltas` if those are only the new ones."""
    seen: dict[int, int] = {}
    told_prompt = False

    def add(prompt: int, index: int, completion: int) -> None:
        nonlocal told_prompt
        if not told_prompt:
            told_prompt = True
            tokens.prompt += prompt
        tokens.completion += completion if deltas else completion - seen.get(index, 0)
        seen[index] = completion

    return add
