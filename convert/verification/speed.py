"""Decode speed: tokens per second once an answer is under way."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from convert.progress import Progress, silent
from convert.verification.client import EngineClient
from convert.verification.engine import HERE, EngineOptions, Served, running_engine

# Which tokens they are makes no difference to the speed; every vocabulary has these.
_PROMPT_TOKENS = 16
_FIRST_TOKEN = 10
_WARM_UP_TOKENS = 4
_CONTEXT_TOKENS = 256
_MODEL, _ADAPTER = "model", "adapter"


@dataclass(frozen=True)
class DecodeSpeed:
    """Of so many streams at once."""

    streams: int
    tokens_per_s: float
    """Of all streams together."""


def decode_speed(
    client: EngineClient,
    model: str,
    streams: Sequence[int] = (1, 8),
    tokens: int = 64,
    progress: Progress = silent,
) -> tuple[DecodeSpeed, ...]:
    """Greedy answers of `tokens` tokens that nothing ends earlier, after a warm-up, for each number of streams.

    The time of an answer of one token is taken off: what remains is decoding alone, without the request and the
    prompt.
    """
    found = []
    for done, count in enumerate(streams):
        progress("decode speed", done, len(streams))
        _generate(client, model, count, _WARM_UP_TOKENS)
        first_s = _generate(client, model, count, 1)
        whole_s = _generate(client, model, count, tokens)
        # On a machine that stalled during the short one the whole time is the better estimate.
        decoding_s = whole_s - first_s if whole_s > first_s else whole_s
        found.append(DecodeSpeed(count, count * (tokens - 1) / decoding_s))
    progress("decode speed", len(streams), len(streams))
    return tuple(found)


def measure_speed(
    model: Path,
    adapter: Path | None = None,
    rank: int = 0,
    streams: Sequence[int] = (1, 8),
    tokens: int = 64,
    options: EngineOptions = HERE,
    progress: Progress = silent,
) -> tuple[DecodeSpeed, ...]:
    """The same of model files, or of an adapter of `rank` on them, in an engine of their own. Raises ConvertError."""
    context = max(_CONTEXT_TOKENS, 2 * _PROMPT_TOKENS + tokens)
    served = Served(model, _MODEL, context, {_ADAPTER: adapter} if adapter else {}, rank)
    with running_engine(served, options, progress) as client:
        return decode_speed(client, _ADAPTER if adapter else _MODEL, streams, tokens, progress)


def _generate(client: EngineClient, model: str, streams: int, tokens: int) -> float:
    """Seconds until all of so many answers are there."""

    def answer(stream: int) -> None:
        first = _FIRST_TOKEN + stream
        client.generate(model, range(first, first + _PROMPT_TOKENS), tokens, ignore_eos=True)

    with ThreadPoolExecutor(streams) as pool:
        begin = time.perf_counter()
        list(pool.map(answer, range(streams)))
        return time.perf_counter() - begin
