"""Bounds the number of adapters that have time series of their own: the busiest have, the others count as `(other)`.

An adapter gets its label as long as there are labels left. Later a busier adapter replaces the quietest one, which
keeps its label for a while longer, so that Prometheus scrapes its last values. Events of an adapter without a
label count as `(other)` for ever: no counter decreases, and nothing is counted twice.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable

from serve.observability.metrics import OTHER

LEAVES_AFTER_S = 300.0  # Prometheus drops a series that it has not scraped for this long
_REVIEW_EVERY_S = 30.0
_HALF_LIFE_S = 600.0
_BUSIER = 2.0  # a newcomer needs this many times the requests: otherwise two equal adapters would alternate
_QUIET = 0.5  # requests, decayed


class LabelLimiter:
    """Labels for at most `limit` adapters, chosen by their recent requests."""

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = limit
        self._clock = clock
        self._requests: dict[str, float] = {}  # decayed
        self._labelled: set[str] = set()
        self._leaving: dict[str, tuple[float, str]] = {}  # adapter → when it loses its label, and to which adapter
        self._reviewed_s = self._decayed_s = clock()

    @property
    def shown(self) -> frozenset[str]:
        """Adapters whose series are exported."""
        return frozenset(self._labelled | self._leaving.keys())

    def count_request(self, adapter: str) -> None:
        self._requests[adapter] = self._requests.get(adapter, 0.0) + 1.0

    def label(self, adapter: str) -> str:
        """The label that an event of the adapter counts under now: its name, or `(other)`."""
        if adapter in self._labelled:
            return adapter
        if adapter not in self._leaving and len(self._labelled) + len(self._leaving) < self._limit:
            self._labelled.add(adapter)
            return adapter
        return OTHER

    def review(self) -> None:
        """Give labels to busier adapters. Cheap if the last review was a moment ago."""
        now = self._clock()
        self._hand_over(now)
        if now - self._reviewed_s < _REVIEW_EVERY_S:
            return
        self._reviewed_s = now
        self._decay(now)
        quietest = sorted(self._labelled, key=lambda adapter: self._requests.get(adapter, 0.0))
        for newcomer, leaver in zip(self._candidates(), quietest, strict=False):
            if self._requests[newcomer] < _BUSIER * max(self._requests.get(leaver, 0.0), _QUIET):
                break
            self._replace(leaver, newcomer, now)

    def _candidates(self) -> list[str]:
        """Adapters without a label, busiest first."""
        busiest = heapq.nlargest(self._limit, self._requests, key=self._requests.__getitem__)
        promised = {newcomer for _, newcomer in self._leaving.values()}
        return [adapter for adapter in busiest if adapter not in self._labelled and adapter not in promised]

    def _replace(self, leaver: str, newcomer: str, now: float) -> None:
        successor = newcomer
        if newcomer in self._leaving:  # it keeps its label, and the adapter that waits for it gets the leaver's
            _, successor = self._leaving.pop(newcomer)
            self._labelled.add(newcomer)
        self._labelled.remove(leaver)
        self._leaving[leaver] = (now + LEAVES_AFTER_S, successor)

    def _hand_over(self, now: float) -> None:
        for leaver, (until, newcomer) in list(self._leaving.items()):
            if until <= now:
                del self._leaving[leaver]
                self._labelled.add(newcomer)

    def _decay(self, now: float) -> None:
        factor = 0.5 ** ((now - self._decayed_s) / _HALF_LIFE_S)
        self._decayed_s = now
        decayed = {adapter: requests * factor for adapter, requests in self._requests.items()}
        self._requests = {adapter: requests for adapter, requests in decayed.items() if requests >= _QUIET}
