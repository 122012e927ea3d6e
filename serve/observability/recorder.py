"""Counts the requests and events of a replica, and logs one line for each event of an adapter."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import get_args

from serve.errors import (
    AdapterQueueFull,
    AdapterWaitTooLong,
    CallerQueueFull,
    EngineQueueFull,
    EngineWaitTooLong,
    PublishFailed,
    PublishUnconfirmed,
    ServeError,
)
from serve.names import AdapterRevision, RequestedModel
from serve.observability.events import Drift, Events, UnloadReason
from serve.observability.label_cap import LabelLimiter
from serve.observability.metric_values import MetricFamilies, MetricValues
from serve.observability.metrics import (
    BASE,
    CACHED_TOKENS,
    DRIFT,
    FAILED,
    FIRST_TOKEN_SECONDS,
    FOLLOW_FAILURES,
    GENERATED_TOKENS,
    HITS,
    IDENTITY_CHECKS,
    IDENTITY_VIOLATIONS,
    LOAD_SECONDS,
    LOADS,
    OTHER,
    PROMPT_TOKENS,
    PROOF_FAILURES,
    PUBLISH_SECONDS,
    REJECTED,
    REQUEST_SECONDS,
    REQUESTS,
    SWAPS,
    TOKEN_SECONDS,
    UNKNOWN,
    UNLOADS,
    WAIT_SECONDS,
)
from serve.observability.request_record import CLIENT_CLOSED_REQUEST, RequestRecord

_ALWAYS_NAMED = (BASE, UNKNOWN)
_QUEUE_REASONS = (
    *(AdapterQueueFull.code, AdapterWaitTooLong.code, CallerQueueFull.code),
    *(EngineQueueFull.code, EngineWaitTooLong.code),
)
_KEPT_PER_LABEL = 10  # values of adapters that lost their label, in case they get it back

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Finished:
    """The engine's report of a request that has ended."""

    engine_name: str | None  # of the adapter; None: the base model
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    token_s: float  # mean between tokens, after the first


class MetricsRecorder(Events):
    """Counters and histograms of one replica: by the label of an adapter, and in total."""

    def __init__(self, max_adapters: int) -> None:
        self.limiter = LabelLimiter(max_adapters)
        self.in_flight = 0
        self.last_read_s: float | None = None
        self._max_kept = _KEPT_PER_LABEL * max_adapters
        self._total = MetricValues()
        self._by_label: OrderedDict[str, MetricValues] = OrderedDict()  # the label that was counted last is last
        self._begin_at_zero()

    def request_ended(self, record: RequestRecord, is_engine_call: bool) -> None:
        """Called once for every request. A request that another replica answered is counted there."""
        if record.error:
            self._total.add(REJECTED, (record.error,))
        if record.forwarded or not is_engine_call:
            return
        if record.adapter not in _ALWAYS_NAMED:
            self.limiter.count_request(record.adapter)
        values = self._values_of(record.adapter)
        values.add(REQUESTS, (record.route, str(record.status)))
        values.add(FAILED, by=float(record.has_failed))
        if record.level:
            values.add(HITS, (record.level,))
        if record.waited_s is not None:
            values.observe(WAIT_SECONDS, record.waited_s)
        if record.status < CLIENT_CLOSED_REQUEST:
            values.observe(REQUEST_SECONDS, record.age_s)
        if record.streamed and record.first_s is not None:
            values.observe(FIRST_TOKEN_SECONDS, record.first_s - record.began_s)

    def engine_finished(self, finished: Finished) -> None:
        name = finished.engine_name
        values = self._values_of(RequestedModel.parse(name).name if name else BASE)
        values.add(PROMPT_TOKENS, by=finished.prompt_tokens)
        values.add(CACHED_TOKENS, by=finished.cached_tokens)
        values.add(GENERATED_TOKENS, by=finished.generated_tokens)
        if finished.generated_tokens > 1:
            values.observe(TOKEN_SECONDS, finished.token_s)

    def loaded(self, adapter: AdapterRevision, fetch_s: float, engine_s: float) -> None:
        values = self._values_of(adapter.name)
        values.add(LOADS, ("loaded",))
        for watched in (IDENTITY_VIOLATIONS, FAILED):
            values.add(watched, by=0)  # see `_begin_at_zero`
        self._total.observe(LOAD_SECONDS, fetch_s, ("fetch",))
        self._total.observe(LOAD_SECONDS, engine_s, ("engine",))
        _log_event("adapter loaded", adapter, fetch_s=fetch_s, engine_s=engine_s)

    def load_failed(self, adapter: AdapterRevision, why: Exception) -> None:
        self._values_of(adapter.name).add(LOADS, ("failed",))
        _log_event("adapter load failed", adapter, logging.WARNING, reason=str(why), code=_code(why))

    def unloaded(self, adapter: AdapterRevision, reason: UnloadReason) -> None:
        self._values_of(adapter.name).add(UNLOADS, (reason,))
        _log_event("adapter unloaded", adapter, reason=reason)

    def drift_repaired(self, kind: Drift, count: int, description: str) -> None:
        self._total.add(DRIFT, (kind,), count)

    def verification_failed(self, adapter: AdapterRevision, why: Exception) -> None:
        self._values_of(adapter.name).add(PROOF_FAILURES)
        _log_event("adapter proof failed", adapter, logging.WARNING, reason=str(why), code=_code(why))

    def followed(self, epoch: int) -> None:
        self.last_read_s = time.monotonic()

    def follow_failed(self) -> None:
        self._total.add(FOLLOW_FAILURES)

    def changed(self, verb: str, adapter: str, outcome: str, staged_s: float = 0, promoted_s: float = 0) -> None:
        self._total.add(SWAPS, (verb, outcome))
        if outcome == "done" and verb in ("publish", "stage"):
            self._total.observe(PUBLISH_SECONDS, staged_s, ("stage",))
        if outcome == "done" and verb in ("publish", "promote", "rollback"):
            self._total.observe(PUBLISH_SECONDS, promoted_s, ("promote",))
        fields: dict[str, object] = {"event": "catalogue changed", "verb": verb, "adapter": adapter, "outcome": outcome}
        fields |= {"staged_s": staged_s, "promoted_s": promoted_s}
        level = logging.INFO if outcome == "done" else logging.WARNING
        logger.log(level, "%s of %s: %s", verb, adapter, outcome, extra=fields)

    def identity_checked(self, adapter: AdapterRevision, distance_nats: float, is_itself: bool) -> None:
        self._total.add(IDENTITY_CHECKS)
        if not is_itself:
            self._values_of(adapter.name).add(IDENTITY_VIOLATIONS)
            _log_event("adapter answers as another one", adapter, logging.ERROR, distance_nats=distance_nats)

    def label(self, adapter: str) -> str:
        return adapter if adapter in _ALWAYS_NAMED else self.limiter.label(adapter)

    def add_to(self, families: MetricFamilies) -> None:
        """Add all values, after busier adapters have got their labels."""
        self.limiter.review()
        self._total.add_to(families)
        shown = {OTHER, *_ALWAYS_NAMED, *self.limiter.shown}
        for label, values in self._by_label.items():
            if label in shown:
                values.add_to(families, (label,))
        hidden = [label for label in self._by_label if label not in shown]
        for label in hidden[: max(0, len(self._by_label) - self._max_kept)]:
            del self._by_label[label]

    def _begin_at_zero(self) -> None:
        """Prometheus sees no increase in a counter that begins at 1, so counters that alerts watch begin at 0."""
        for spec in (FOLLOW_FAILURES, IDENTITY_CHECKS):
            self._total.add(spec, by=0)
        self._values_of(BASE).add(FAILED, by=0)
        for kind in get_args(Drift):
            self._total.add(DRIFT, (kind,), 0)
        for reason in _QUEUE_REASONS:
            self._total.add(REJECTED, (reason,), 0)
        for verb in ("publish", "promote", "rollback"):
            for outcome in ("done", PublishFailed.code, PublishUnconfirmed.code):
                self._total.add(SWAPS, (verb, outcome), 0)

    def _values_of(self, adapter: str) -> MetricValues:
        label = self.label(adapter)
        if label not in self._by_label:
            self._by_label[label] = MetricValues()
        self._by_label.move_to_end(label)
        return self._by_label[label]


def _log_event(event: str, adapter: AdapterRevision, level: int = logging.INFO, **fields: object) -> None:
    logger.log(level, "%s: %s", event, adapter, extra={"event": event, "adapter": adapter.engine_name, **fields})


def _code(why: Exception) -> str:
    return why.code if isinstance(why, ServeError) else "server_error"
