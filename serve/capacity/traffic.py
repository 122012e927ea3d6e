"""The traffic of each model: made up by Zipf's law, or read from a log."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from serve.errors import TrafficLogInvalid

_MAX_LINE_BYTES = 1 << 20


@dataclass(frozen=True)
class ModelTraffic:
    """The traffic of one model. Times in the engine are exponential with the mean `service_s`."""

    name: str
    rate: float  # requests a second
    service_s: float  # mean time in the engine, without waiting
    tokens: float  # mean number of generated tokens
    adapter: bool = True  # False: the base model, which needs no slot

    @property
    def load(self) -> float:
        """The mean number of its requests that are in an engine at a time."""
        return self.rate * self.service_s


@dataclass(frozen=True)
class _LoggedRequest:
    time_s: float
    name: str
    adapter: bool
    service_s: float
    tokens: float


def zipf(adapters: int, rate: float, exponent: float, tokens: float, token_s: float) -> tuple[ModelTraffic, ...]:
    """`rate` requests a second over all adapters; the share of the n-th is proportional to n^-exponent."""
    weights = [n**-exponent for n in range(1, adapters + 1)]
    total = sum(weights)
    return tuple(
        ModelTraffic(f"adapter-{n}", rate * weight / total, tokens * token_s, tokens)
        for n, weight in enumerate(weights, 1)
    )


def read_log(path: Path, token_s: float, sample: float, window_s: float) -> tuple[ModelTraffic, ...]:
    """The traffic in the busiest `window_s` of a log, the model with the most requests first.

    A line is one of the access log (`time`, `adapter` as NAME@REVISION or the base model, `duration_s`, `waited_s`),
    which holds a `sample` share of the requests; or an object of `time`, `model` and `tokens`. Lines of other events
    and of failed requests are skipped. Raises TrafficLogInvalid with the number of the line.
    """
    try:
        with path.open("rb") as file:
            parsed = (_parse_line(path, number, line, token_s) for number, line in enumerate(file, 1))
            requests = [request for request in parsed if request]
    except OSError as error:
        raise TrafficLogInvalid(f"Can't read {path}: {error.strerror}.") from error
    if len(requests) < 2:
        raise TrafficLogInvalid(
            f"{path} holds {len(requests)} answered requests; rates need two at least. Expected lines of the access "
            'log (see docs/how-to/monitor.md), or {"time": …, "model": …, "tokens": …}.'
        )
    requests.sort(key=lambda request: request.time_s)
    busiest, length_s = _busiest_window(requests, window_s)
    return _traffic_of(busiest, length_s * sample)


def _parse_line(path: Path, number: int, line: bytes, token_s: float) -> _LoggedRequest | None:
    if not line.strip():
        return None
    try:
        if len(line) > _MAX_LINE_BYTES:
            raise ValueError(f"longer than {_MAX_LINE_BYTES} bytes")
        return _parse_request(json.loads(line), token_s)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise TrafficLogInvalid(f"{path}, line {number}: {reason}. Expected one JSON object a line.") from error


def _parse_request(line: Any, token_s: float) -> _LoggedRequest | None:
    """None for a line that is no answered request. Raises TypeError, KeyError or ValueError."""
    if not isinstance(line, Mapping):
        raise TypeError(f"{type(line).__name__} instead of an object")
    if line.get("event", "request") != "request" or _number(line, "status", 200) >= 400:
        return None
    is_access_log = "event" in line
    if is_access_log and not line.get("adapter"):
        return None  # the request ended before its model was known
    name = line["adapter"] if is_access_log else line["model"]
    if not isinstance(name, str) or not name:
        raise TypeError("the model's name is no text")
    public_name, _, revision = name.partition("@")
    service_s, tokens = _service_and_tokens(line, token_s)
    return _LoggedRequest(_seconds(line["time"]), public_name, bool(revision) or not is_access_log, service_s, tokens)


def _service_and_tokens(line: Mapping[str, Any], token_s: float) -> tuple[float, float]:
    """Seconds in the engine, and tokens. A missing one is computed from the other."""
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


def _seconds(value: Any) -> float:
    """A time in seconds, from a number or from a text such as 2026-01-31T12:00:00+00:00."""
    if isinstance(value, str):
        return datetime.fromisoformat(value).timestamp()
    return _number({"time": value}, "time")


def _busiest_window(requests: list[_LoggedRequest], window_s: float) -> tuple[list[_LoggedRequest], float]:
    """The requests in the window with most work, and its length; all requests if the log is shorter than a window."""
    length_s = requests[-1].time_s - requests[0].time_s
    if length_s <= window_s:
        return requests, max(length_s, 1e-3)
    busiest, most_work_s, first, work_s = (0, 0), -1.0, 0, 0.0
    for last, request in enumerate(requests):
        work_s += request.service_s
        while requests[first].time_s <= request.time_s - window_s:
            work_s -= requests[first].service_s
            first += 1
        if work_s > most_work_s:
            busiest, most_work_s = (first, last + 1), work_s
    return requests[slice(*busiest)], window_s


def _traffic_of(requests: Iterable[_LoggedRequest], length_s: float) -> tuple[ModelTraffic, ...]:
    by_name: dict[str, list[_LoggedRequest]] = defaultdict(list)
    for request in requests:
        by_name[request.name].append(request)
    traffic = [
        ModelTraffic(
            name,
            rate=len(group) / length_s,
            service_s=sum(request.service_s for request in group) / len(group),
            tokens=sum(request.tokens for request in group) / len(group),
            adapter=any(request.adapter for request in group),
        )
        for name, group in by_name.items()
    ]
    return tuple(sorted(traffic, key=lambda model: (-model.rate, model.name)))
