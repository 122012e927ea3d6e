"""Counts what happens in a replica, and writes one line of log for each event of an adapter's life."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import get_args

from serve.busiest import Busiest
from serve.errors import (
    AdapterQueueFull,
    AdapterWaitTooLong,
    CallerQueueFull,
    PublishFailed,
    PublishUnconfirmed,
    ServeError,
)
from serve.events import Drift, Events, Left
from serve.metrics import (
    BASE,
    CACHED_TOKENS,
    DRIFT,
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
    Families,
    Store,
)
from serve.names import AdapterRevision, RequestedModel
from serve.request_record import LEFT, RequestRecord

_ALWAYS_NAMED = (BASE, UNKNOWN)
_QUEUE_REASONS = (AdapterQueueFull.code, AdapterWaitTooLong.code, CallerQueueFull.code)
_KEPT_PER_SHOWN = 10  # counts of adapters that lost their name, in case they come back

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Finished:
    """What the engine says of a request when it has ended; seconds."""

    engine_name: str | None  # of the adapter; None: the base model
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    token_s: float  # mean between tokens, after the first


class Recorder(Events):
    """All counts of one replica. `stores` is by adapter, `total` for the rest."""

    def __init__(self, max_adapters: int) -> None:
        self.busiest = Busiest(max_adapters)
        self.in_flight = 0
        self.followed_s: float | None = None
        self._kept = _KEPT_PER_SHOWN * max_adapters
        self._total = Store()
        self._stores: OrderedDict[str, Store] = OrderedDict()  # what was counted last is last
        self._begin_at_zero()

    def request_ended(self, record: RequestRecord, is_engine_call: bool) -> None:
        """Of every request, once; one that another replica answered is counted there."""
        if record.error:
            self._total.add(REJECTED, (record.error,))
        if record.forwarded or not is_engine_call:
            return
        if record.adapter not in _ALWAYS_NAMED:
            self.busiest.asked(record.adapter)
        store = self._of(record.adapter)
        store.add(REQUESTS, (record.route, str(record.status)))
        if record.level:
            store.add(HITS, (record.level,))
        if record.waited_s is not None:
            store.observe(WAIT_SECONDS, record.waited_s)
        if record.status < LEFT:
            store.observe(REQUEST_SECONDS, time.monotonic() - record.began_s)
        if record.streamed and record.first_s is not None:
            store.observe(FIRST_TOKEN_SECONDS, record.first_s - record.began_s)

    def engine_finished(self, finished: Finished) -> None:
        name = finished.engine_name
        store = self._of(RequestedModel.parse(name).name if name else BASE)
        store.add(PROMPT_TOKENS, by=finished.prompt_tokens)
        store.add(CACHED_TOKENS, by=finished.cached_tokens)
        store.add(GENERATED_TOKENS, by=finished.generated_tokens)
        if finished.generated_tokens > 1:
            store.observe(TOKEN_SECONDS, finished.token_s)

    def loaded(self, adapter: AdapterRevision, fetch_s: float, engine_s: float) -> None:
        self._of(adapter.name).add(LOADS, ("loaded",))
        self._of(adapter.name).add(IDENTITY_VIOLATIONS, by=0)
        self._total.observe(LOAD_SECONDS, fetch_s, ("fetch",))
        self._total.observe(LOAD_SECONDS, engine_s, ("engine",))
        _tell("adapter loaded", adapter, fetch_s=fetch_s, engine_s=engine_s)

    def load_failed(self, adapter: AdapterRevision, why: Exception) -> None:
        self._of(adapter.name).add(LOADS, ("failed",))
        _tell("adapter load failed", adapter, logging.WARNING, reason=str(why), code=_code(why))

    def left(self, adapter: AdapterRevision, reason: Left) -> None:
        self._of(adapter.name).add(UNLOADS, (reason,))
        _tell("adapter unloaded", adapter, reason=reason)

    def mended(self, kind: Drift, count: int, what: str) -> None:
        self._total.add(DRIFT, (kind,), count)

    def proof_failed(self, adapter: AdapterRevision, why: Exception) -> None:
        self._of(adapter.name).add(PROOF_FAILURES)
        _tell("adapter proof failed", adapter, logging.WARNING, reason=str(why), code=_code(why))

    def followed(self, epoch: int) -> None:
        self.followed_s = time.monotonic()

    def follow_failed(self) -> None:
        self._total.add(FOLLOW_FAILURES)

    def changed(self, verb: str, adapter: str, outcome: str, staged_s: float = 0, promoted_s: float = 0) -> None:
        self._total.add(SWAPS, (verb, outcome))
        if outcome == "done" and verb in ("publish", "stage"):
            self._total.observe(PUBLISH_SECONDS, staged_s, ("stage",))
        if outcome == "done" and verb in ("publish", "promote", "rollback"):
            self._total.observe(PUBLISH_SECONDS, promoted_s, ("promote",))
        told: dict[str, object] = {"event": "catalogue changed", "verb": verb, "adapter": adapter, "outcome": outcome}
        told |= {"staged_s": staged_s, "promoted_s": promoted_s}
        level = logging.INFO if outcome == "done" else logging.WARNING
        logger.log(level, "%s of %s: %s", verb, adapter, outcome, extra=told)

    def identity_checked(self, adapter: AdapterRevision, distance_nats: float, is_itself: bool) -> None:
        self._total.add(IDENTITY_CHECKS)
        if not is_itself:
            self._of(adapter.name).add(IDENTITY_VIOLATIONS)
            _tell("adapter answers as another one", adapter, logging.ERROR, distance_nats=distance_nats)

    def label(self, adapter: str) -> str:
        return adapter if adapter in _ALWAYS_NAMED else self.busiest.label(adapter)

    def into(self, families: Families) -> None:
        """Tell all counts; lets busier adapters have a name first."""
        self.busiest.review()
        self._total.into(families)
        shown = {OTHER, *_ALWAYS_NAMED, *self.busiest.shown}
        for label, store in self._stores.items():
            if label in shown:
                store.into(families, (label,))
        for label in [it for it in self._stores if it not in shown][: max(0, len(self._stores) - self._kept)]:
            del self._stores[label]

    def _begin_at_zero(self) -> None:
        """Prometheus sees no increase in a count that begins with 1: what alerts look at is there before."""
        for spec in (FOLLOW_FAILURES, IDENTITY_CHECKS):
            self._total.add(spec, by=0)
        for kind in get_args(Drift):
            self._total.add(DRIFT, (kind,), 0)
        for reason in _QUEUE_REASONS:
            self._total.add(REJECTED, (reason,), 0)
        for verb in ("publish", "promote", "rollback"):
            for outcome in ("done", PublishFailed.code, PublishUnconfirmed.code):
                self._total.add(SWAPS, (verb, outcome), 0)

    def _of(self, adapter: str) -> Store:
        label = self.label(adapter)
        if label not in self._stores:
            self._stores[label] = Store()
        self._stores.move_to_end(label)
        return self._stores[label]


def _tell(event: str, adapter: AdapterRevision, level: int = logging.INFO, **more: object) -> None:
    logger.log(level, "%s: %s", event, adapter, extra={"event": event, "adapter": adapter.engine_name, **more})


def _code(why: Exception) -> str:
    return why.code if isinstance(why, ServeError) else "server_error"
