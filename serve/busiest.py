"""Which adapters have a name in the metrics: the busiest ones. The rest are counted together as `(other)`.

A name enters as long as there is room. Later a busier adapter takes the place of the quietest one, which is shown for
a while longer, so that whoever scrapes sees the last it did. What an adapter does while it has no name is counted as
`(other)` and never moved: no count goes down, and nothing is counted twice.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable

from serve.metrics import OTHER

LEAVES_AFTER_S = 300.0  # Prometheus forgets a series that it hasn't seen for as long
_LOOK_EVERY_S = 30.0
_HALF_LIFE_S = 600.0
_BUSIER = 2.0  # a newcomer must have so many times the requests, or two equal ones would change places for ever
_QUIET = 0.5  # requests, decayed


class Busiest:
    """At most `limit` adapters by recent requests."""

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = limit
        self._clock = clock
        self._requests: dict[str, float] = {}  # decayed
        self._named: set[str] = set()
        self._leaving: dict[str, tuple[float, str]] = {}  # when it is gone, and who has its place then
        self._looked_s = self._decayed_s = clock()

    @property
    def shown(self) -> frozenset[str]:
        return frozenset(self._named | self._leaving.keys())

    def asked(self, adapter: str) -> None:
        """It was asked for once."""
        self._requests[adapter] = self._requests.get(adapter, 0.0) + 1.0

    def label(self, adapter: str) -> str:
        """What to count it under now."""
        if adapter in self._named:
            return adapter
        if adapter not in self._leaving and len(self._named) + len(self._leaving) < self._limit:
            self._named.add(adapter)
            return adapter
        return OTHER

    def review(self) -> None:
        """Let busier ones in; cheap if it was done a moment ago."""
        now = self._clock()
        self._let_in(now)
        if now - self._looked_s < _LOOK_EVERY_S:
            return
        self._looked_s = now
        self._decay(now)
        busiest = heapq.nlargest(self._limit, self._requests, key=self._requests.__getitem__)
        promised = {newcomer for _, newcomer in self._leaving.values()}
        outside = [adapter for adapter in busiest if adapter not in self._named and adapter not in promised]
        quietest = sorted(self._named, key=lambda adapter: self._requests.get(adapter, 0.0))
        for newcomer, leaves in zip(outside, quietest, strict=False):
            if self._requests[newcomer] < _BUSIER * max(self._requests.get(leaves, 0.0), _QUIET):
                break
            self._named.remove(leaves)
            if newcomer in self._leaving:  # back before it was gone: the other one goes in its stead
                _, waits = self._leaving.pop(newcomer)
                self._named.add(newcomer)
                self._leaving[leaves] = (now + LEAVES_AFTER_S, waits)
            else:
                self._leaving[leaves] = (now + LEAVES_AFTER_S, newcomer)

    def _let_in(self, now: float) -> None:
        for leaves, (until, newcomer) in list(self._leaving.items()):
            if until <= now:
                del self._leaving[leaves]
                self._named.add(newcomer)

    def _decay(self, now: float) -> None:
        factor = 0.5 ** ((now - self._decayed_s) / _HALF_LIFE_S)
        self._decayed_s = now
        left = {adapter: requests * factor for adapter, requests in self._requests.items()}
        self._requests = {adapter: requests for adapter, requests in left.items() if requests >= _QUIET}
