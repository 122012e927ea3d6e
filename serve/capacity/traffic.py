"""How much each model is asked for: made up, by Zipf's law, or read from a log."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from serve.errors import TrafficLogInvalid

_MOST_LINE_BYTES = 1 << 20


@dataclass(frozen=True)
class Asked:
    """One model's traffic. Answers take exponentially long around `service_s`."""

    name: str
    rate: float  # requests a second
    service_s: float  # mean time in the engine, without waiting
    tokens: float  # generated, of a mean answer
    adapter: bool = True  # False: the base model, which needs no slot

    @property
    def load(self) -> float:
        """Requests of it that are in an engine at a time."""
        return self.rate * self.service_s


@dataclass(frozen=True)
class _Line:
    time_s: float
    name: str
    adapter: bool
    service_s: float
    tokens: float


def zipf(adapters: int, rate: float, exponent: float, tokens: float, token_s: float) -> tuple[Asked, ...]:
    """`rate` requests a second over all; the n-th adapter gets a share that falls as n^-exponent."""
    weights = [n**-exponent for n in range(1, adapters + 1)]
    total = sum(weights)
    return tuple(
        Asked(f"adapter-{n}", rate * weight / total, tokens * token_s, tokens) for n, weight in enumerate(weights, 1)
    )


def read_log(path: Path, token_s: float, sample: float, window_s: float) -> tuple[Asked, ...]:
    """The busiest `window_s` of a log, most asked for first.

    Lines are those of the access log, of which `sample` is the share that was written down: `time`, `adapter` as
    NAME@REVISION or the base model, `duration_s` and `waited_s`. Or `time`, `model` and `tokens`. Lines of other events
    and of requests that failed are passed over. Raises TrafficLogInvalid, with the number of the line.
    """
    try:
        with path.open("rb") as file:
            lines = [it for number, raw in enumerate(file, 1) if (it := _line(path, number, raw, token_s))]
    except OSError as error:
        raise TrafficLogInvalid(f"Can't read {path}: {error.strerror}.") from error
    if len(lines) < 2:
        raise TrafficLogInvalid(
            f"{path} holds {len(lines)} answered requests; rates need two at least. Expected lines of the access log "
            '(see docs/monitoring.md), or {"time": …, "model": …, "tokens": …}.'
        )
    lines.sort(key=lambda it: it.time_s)
    busiest, length_s = _busiest(lines, window_s)
    return _summed(busiest, length_s * sample)


def _line(path: Path, number: int, raw: bytes, token_s: float) -> _Line | None:
    if not raw.strip():
        return None
    try:
        if len(raw) > _MOST_LINE_BYTES:
            raise ValueError(f"longer than {_MOST_LINE_BYTES} bytes")
        return _parsed(json.loads(raw), token_s)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise TrafficLogInvalid(f"{path}, line {number}: {what}. Expected one JSON object a line.") from error


def _parsed(line: Any, token_s: float) -> _Line | None:
    if not isinstance(line, Mapping):
        raise TypeError(f"{type(line).__name__} instead of an object")
    if line.get("event", "request") != "request" or _number(line, "status", 200) >= 400:
        return None
    logged = "event" in line
    if logged and not line.get("adapter"):
        return None  # it ended before its model was known
    name = line["adapter"] if logged else line["model"]
    if not isinstance(name, str) or not name:
        raise TypeError("the model's name is no text")
    public, _, revision = name.partition("@")
    service_s, tokens = _work(line, token_s)
    return _Line(_time(line["time"]), public, bool(revision) or not logged, service_s, tokens)


def _work(line: Mapping[str, Any], token_s: float) -> tuple[float, float]:
    """Seconds in the engine, and tokens: where one is missing it follows from the other."""
    tokens = _number(line, "tokens", None) if "tokens" in line else None
    if "duration_s" in line:
        seconds = max(_number(line, "duration_s") - _number(line, "waited_s", 0), 1e-6)
        return seconds, seconds / token_s if tokens is None else tokens
    if tokens is None:
        raise KeyError("tokens")
    return max(tokens, 1) * token_s, tokens


def _number(line: Mapping[str, Any], name: str, default: float | None = None) -> float:
    value = line[name] if default is None else line.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e12:
        raise TypeError(f"`{name}` is {value!r} instead of a number from 0")
    return float(value)


def _time(value: Any) -> float:
    """Seconds: from a number, or from text as 2026-01-31T12:00:00+00:00."""
    if isinstance(value, str):
        return datetime.fromisoformat(value).timestamp()
    return _number({"time": value}, "time")


def _busiest(lines: list[_Line], window_s: float) -> tuple[list[_Line], float]:
    """The lines of the window with most work in it, and its length; all of a log that is shorter."""
    length_s = lines[-1].time_s - lines[0].time_s
    if length_s <= window_s:
        return lines, max(length_s, 1e-3)
    best, best_work, first, work = (0, 0), -1.0, 0, 0.0
    for last, line in enumerate(lines):
        work += line.service_s
        while lines[first].time_s <= line.time_s - window_s:
            work -= lines[first].service_s
            first += 1
        if work > best_work:
            best, best_work = (first, last + 1), work
    return lines[slice(*best)], window_s


def _summed(lines: Iterable[_Line], length_s: float) -> tuple[Asked, ...]:
    found: dict[str, list[_Line]] = defaultdict(list)
    for line in lines:
        found[line.name].append(line)
    asked = [
        Asked(
            name,
            len(of) / length_s,
            sum(it.service_s for it in of) / len(of),
            sum(it.tokens for it in of) / len(of),
            any(it.adapter for it in of),
        )
        for name, of in found.items()
    ]
    return tuple(sorted(asked, key=lambda it: (-it.rate, it.name)))
