"""Counts the tokens of the current request where the engine generates them, and keeps an error that comes before them.

The gateway puts a counter into the context (contextvars) of a request. The engine runs in that context and adds to the
counter. So streams are counted too, and no response has to be parsed.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from serve.engine.api_errors import EngineFault


@dataclass
class Tokens:
    """The tokens that one request has used so far."""

    prompt: int = 0
    completion: int = 0
    has_output: bool = field(default=False, compare=False)  # whether the engine has generated anything
    fault: EngineFault | None = None  # what kept the engine from generating anything

    @property
    def total(self) -> int:
        return self.prompt + self.completion


_counter: ContextVar[Tokens | None] = ContextVar("tokens", default=None)


@contextmanager
def count_tokens() -> Iterator[Tokens]:
    """A counter of the tokens that are generated inside, also by tasks that are started inside."""
    tokens = Tokens()
    token = _counter.set(tokens)
    try:
        yield tokens
    finally:
        _counter.reset(token)


def current_counter() -> Tokens | None:
    """The counter of the current context; None outside of `count_tokens`."""
    return _counter.get()


@contextmanager
def _keep_fault(tokens: Tokens, fault_of: Callable[[Exception], EngineFault | None]) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not tokens.has_output:
            tokens.fault = fault_of(error)
        raise


async def count_outputs(
    outputs: AsyncGenerator[Any, None],
    tokens: Tokens,
    deltas: bool,
    check_first: Callable[[Any], None] = lambda _: None,
    fault_of: Callable[[Exception], EngineFault | None] = lambda _: None,
) -> AsyncGenerator[Any, None]:
    """Yields `outputs`, which are vLLM's RequestOutput or PoolingRequestOutput, unchanged, and adds their tokens to
    `tokens`. `deltas`: each output has only the new tokens of a sequence, not all of them so far. `check_first` gets
    the first output, and raises an error for one that is none. An error before any output is kept in `tokens`, as
    `fault_of` describes it."""
    seen: dict[int, int] | None = None
    # Closing this generator closes `outputs` at once: so the engine learns that the request is aborted.
    async with contextlib.aclosing(outputs):
        with _keep_fault(tokens, fault_of):
            async for output in outputs:
                if seen is None:
                    check_first(output)
                    seen, tokens.has_output = {}, True
                    tokens.prompt += len(output.prompt_token_ids or ())
                if isinstance(output.outputs, list):  # a vector has no tokens
                    for sequence in output.outputs:
                        count = len(sequence.token_ids)
                        tokens.completion += count if deltas else count - seen.get(sequence.index, 0)
                        seen[sequence.index] = count
                yield output
