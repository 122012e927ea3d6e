"""Measures decode speed: tokens per second after the first token of an answer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from convert.progress import Progress, silent
from convert.verification.client import EngineClient
from convert.verification.engine import DEFAULT_ENGINE, EngineOptions, ServedModel, running_engine

# The speed doesn't depend on the tokens; every vocabulary has these.
_PROMPT_TOKENS = 16
_FIRST_TOKEN = 10
_WARM_UP_TOKENS = 4
_CONTEXT_TOKENS = 256
_MODEL, _ADAPTER = "model", "adapter"


@dataclass(frozen=True)
class DecodeSpeed:
    """The speed with a number of streams at once. `tokens_per_s`: of all streams together."""

    streams: int
    tokens_per_s: float


def decode_speed(
    client: EngineClient,
    model: str,
    streams: Sequence[int] = (1, 8),
    tokens: int = 64,
    progress: Progress = silent,
) -> tuple[DecodeSpeed, ...]:
    """Measure greedy answers of exactly `tokens` tokens for each number of streams, after a warm-up.

    The time of an answer of one token is subtracted, so that only decoding is measured, without the request and the
    prompt.
    """
    speeds = []
    for done, count in enumerate(streams):
        progress("decode speed", done, len(streams))
        _generate(client, model, count, _WARM_UP_TOKENS)
        first_s = _generate(client, model, count, 1)
        whole_s = _generate(client, model, count, tokens)
        # If the machine stalled during the one-token answer, the time of the whole answer is the better estimate.
        decoding_s = whole_s - first_s if whole_s > first_s else whole_s
        speeds.append(DecodeSpeed(count, count * (tokens - 1) / decoding_s))
    progress("decode speed", len(streams), len(streams))
    return tuple(speeds)


def measure_speed(
    model: Path,
    adapter: Path | None = None,
    rank: int = 0,
    streams: Sequence[int] = (1, 8),
    tokens: int = 64,
    options: EngineOptions = DEFAULT_ENGINE,
    progress: Progress = silent,
) -> tuple[DecodeSpeed, ...]:
    """The decode speed of a model, or of an adapter of `rank` on it, in an engine of its own. Raises ConvertError."""
    context = max(_CONTEXT_TOKENS, 2 * _PROMPT_TOKENS + tokens)
    served = ServedModel(model, _MODEL, context, {_ADAPTER: adapter} if adapter else {}, rank)
    with running_engine(served, options, progress) as client:
        return decode_speed(client, _ADAPTER if adapter else _MODEL, streams, tokens, progress)


def _generate(client: EngineClient, model: str, streams: int, tokens: int) -> float:
    """Seconds until the answers of all streams are complete."""

    def answer(stream: int) -> None:
        first = _FIRST_TOKEN + stream
        client.generate(model, range(first, first + _PROMPT_TOKENS), tokens, ignore_eos=True)

    with ThreadPoolExecutor(streams) as pool:
        begin = time.perf_counter()
        list(pool.map(answer, range(streams)))
        return time.perf_counter() - begin
