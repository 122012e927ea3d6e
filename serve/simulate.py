"""Replicas with slots and host memory under traffic, simulated event by event; the same seed gives the same result.

What it knows of the real thing: a request goes to the replica with the fewest requests, or to one that holds its
adapter and is not much busier; an adapter is loaded once for all that wait, one at a time in an engine; the least
recently used one makes room, never one in use; a batch mixes as many adapters as there are slots, which change hands
when a turn is over. What it leaves out: that a token's time depends on the batch, and that a request gives up.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from bisect import bisect
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from serve.traffic import Asked

_WARM_SHARE = 0.2  # of the requests, before anything is counted
_SPARE_REQUESTS = 4
_LOADED, _BASE = -1, -2  # events without an adapter that ended


@dataclass(frozen=True)
class Pool:
    """Replicas that are all alike."""

    replicas: int
    places: int  # requests that an engine works on at a time
    slots: int  # max_active_adapters
    resident: int  # max_resident_adapters
    cold_s: float  # from the store into host memory
    activate_s: float = 0.0  # from host memory into a slot
    turn_s: float = 1.0  # adapter_turn_s
    waiting: int = 128  # max_waiting_requests, of each replica


@dataclass(frozen=True)
class Outcome:
    """Shares are of the requests that were let in."""

    requests: int
    in_slot: float
    in_memory: float
    cold: float
    loads: int  # of adapters into host memory
    refused: int  # too many waited
    wait_p50_s: float
    wait_p99_s: float
    mean_wait_s: float
    busy: float  # share of all places


def simulate(pool: Pool, traffic: Sequence[Asked], requests: int, seed: int = 0, limit_s: float = math.inf) -> Outcome:
    """Serve so many requests. The most asked for adapters are in host memory at the beginning.

    With a limit it ends as soon as it is sure that one in a hundred waits longer, or when one is refused.
    """
    return _Simulation(pool, traffic, seed, limit_s).run(requests)


@dataclass(frozen=True)
class _Request:
    began_s: float
    model: int
    service_s: float
    counted: bool


class _Replica:
    def __init__(self) -> None:
        self.running: Counter[int] = Counter()
        self.since: dict[int, float] = {}  # when its turn began
        self.cleared: set[int] = set()  # running, but taking no more
        self.in_engine = 0
        self.waiting: list[_Request] = []
        self.wanted: Counter[int] = Counter()  # by those that wait
        self.slots: OrderedDict[int, None] = OrderedDict()  # least recently used first, as below
        self.held: OrderedDict[int, float] = OrderedDict()  # since when it is, or will be, ready
        self.loader_free_s = 0.0

    @property
    def busy(self) -> int:
        return self.in_engine + len(self.waiting)


class _Simulation:
    def __init__(self, pool: Pool, traffic: Sequence[Asked], seed: int, limit_s: float) -> None:
        self._pool, self._traffic, self._limit_s = pool, traffic, limit_s
        self._chance = random.Random(seed)  # noqa: S311  (no secret)
        self._replicas = [_Replica() for _ in range(pool.replicas)]
        self._holders: dict[int, set[int]] = {}
        self._events: list[tuple[float, int, int, int]] = []  # time, order, replica, model that ended
        self._order = itertools.count()
        self._waits: list[float] = []
        self._tiers: Counter[str] = Counter()
        self._loads = self._refused = self._late = 0
        self._worked_s = 0.0

    def run(self, requests: int) -> Outcome:
        self._fill()
        rates = list(itertools.accumulate(it.rate for it in self._traffic))
        warm = int(requests * _WARM_SHARE)
        now = 0.0
        for number in range(requests):
            now += self._chance.expovariate(rates[-1])
            self._advance(now)
            model = min(bisect(rates, self._chance.random() * rates[-1]), len(rates) - 1)
            service_s = self._chance.expovariate(1 / self._traffic[model].service_s)
            self._arrive(_Request(now, model, service_s, number >= warm))
            if self._late > (requests - warm) / 100 or (self._refused and self._limit_s < math.inf):
                break
        self._advance(math.inf)
        return self._outcome(now)

    def _fill(self) -> None:
        adapters = [number for number, it in enumerate(self._traffic) if it.adapter]
        adapters.sort(key=lambda number: self._traffic[number].rate, reverse=True)
        for index, replica in enumerate(self._replicas):
            for model in reversed(adapters[: self._pool.resident]):
                replica.held[model] = 0.0
                self._holders.setdefault(model, set()).add(index)

    def _advance(self, until: float) -> None:
        while self._events and self._events[0][0] <= until:
            now, _, index, ended = heapq.heappop(self._events)
            replica = self._replicas[index]
            if ended != _LOADED:
                replica.in_engine -= 1
            if ended >= 0:
                replica.running[ended] -= 1
                if not replica.running[ended]:
                    del replica.running[ended]
            self._dispatch(index, now)

    def _arrive(self, request: _Request) -> None:
        index = self._chosen(request.model)
        replica = self._replicas[index]
        if len(replica.waiting) >= self._pool.waiting:
            # A search for the smallest pool need not see the end of one that overflows before it is warm.
            self._refused += request.counted or self._limit_s < math.inf
            return
        tier = self._tier(replica, request)
        if request.counted:
            self._tiers[tier] += 1
        replica.waiting.append(request)
        replica.wanted[request.model] += 1
        self._dispatch(index, request.began_s)

    def _tier(self, replica: _Replica, request: _Request) -> str:
        if not self._traffic[request.model].adapter or request.model in replica.slots:
            return "slot"
        return "memory" if replica.held.get(request.model, math.inf) <= request.began_s else "cold"

    def _chosen(self, model: int) -> int:
        """The least busy replica; where that would have to evict or to wait, a holder that is not much busier."""
        offset = self._chance.randrange(len(self._replicas))
        ordered = itertools.chain(range(offset, len(self._replicas)), range(offset))
        first = min(ordered, key=lambda it: self._replicas[it].busy)
        replica, pool = self._replicas[first], self._pool
        holds = model in replica.held
        if not self._traffic[model].adapter or (holds and not self._lacks_slot(replica, model)):
            return first
        if not holds and len(replica.held) < pool.resident:
            return first
        holders = [it for it in self._holders.get(model, ()) if self._takes_over(it, replica)]
        return min(holders, key=lambda it: (self._replicas[it].busy, it), default=first)

    def _takes_over(self, index: int, first: _Replica) -> bool:
        """The rule of serve/forward.py."""
        holder = self._replicas[index]
        return not holder.waiting and holder.in_engine <= 2 * first.in_engine + _SPARE_REQUESTS

    def _dispatch(self, index: int, now: float) -> None:
        """Start what can start, in the order of arrival. Who gets a slot takes all that wait for its adapter along."""
        replica = self._replicas[index]
        replica.cleared = self._to_clear(replica, now)
        position = 0
        while position < len(replica.waiting) and replica.in_engine < self._pool.places:
            request = replica.waiting[position]
            if self._may_run(index, request.model, now):
                del replica.waiting[position]
                self._start(index, request, now)
            else:
                position += 1

    def _to_clear(self, replica: _Replica, now: float) -> set[int]:
        """A slot for each adapter that waits, of those whose turn is over: what runs ends, what comes waits."""
        if len(replica.running) < self._pool.slots:
            return set()
        lacking = {
            it.model for it in replica.waiting if it.model not in replica.running and self._traffic[it.model].adapter
        }
        over = [it for it in replica.running if now - replica.since[it] > self._pool.turn_s]
        return set(sorted(over, key=replica.since.__getitem__)[: len(lacking)])

    def _lacks_slot(self, replica: _Replica, model: int) -> bool:
        if not self._traffic[model].adapter:
            return False
        return model in replica.cleared or (model not in replica.running and len(replica.running) >= self._pool.slots)

    def _may_run(self, index: int, model: int, now: float) -> bool:
        """Whether it is loaded and has a slot; begins to load it if it can."""
        if not self._traffic[model].adapter:
            return True
        replica = self._replicas[index]
        if model not in replica.held and not self._load(index, model, now):
            return False
        return replica.held[model] <= now and not self._lacks_slot(replica, model)

    def _load(self, index: int, model: int, now: float) -> bool:
        replica = self._replicas[index]
        if len(replica.held) >= self._pool.resident:
            idle = (it for it in replica.held if it not in replica.running and not replica.wanted[it])
            evicted = next(idle, None)
            if evicted is None:
                return False
            del replica.held[evicted]
            replica.slots.pop(evicted, None)
            self._holders[evicted].discard(index)
        ready_s = max(now, replica.loader_free_s) + self._pool.cold_s
        replica.held[model] = replica.loader_free_s = ready_s
        self._holders.setdefault(model, set()).add(index)
        self._loads += 1
        heapq.heappush(self._events, (ready_s, next(self._order), index, _LOADED))
        return True

    def _start(self, index: int, request: _Request, now: float) -> None:
        replica, model = self._replicas[index], request.model
        replica.wanted[model] -= 1
        replica.in_engine += 1
        delay_s = 0.0
        if self._traffic[model].adapter:
            delay_s = self._activate(replica, model)
            if model not in replica.running:
                replica.since[model] = now
            replica.running[model] += 1
        else:
            model = _BASE
        if request.counted:
            waited_s = now + delay_s - request.began_s
            self._waits.append(waited_s)
            self._late += waited_s > self._limit_s
        self._worked_s += delay_s + request.service_s
        heapq.heappush(self._events, (now + delay_s + request.service_s, next(self._order), index, model))

    def _activate(self, replica: _Replica, model: int) -> float:
        replica.held.move_to_end(model)
        if model in replica.slots:
            replica.slots.move_to_end(model)
            return 0.0
        if len(replica.slots) >= self._pool.slots:
            del replica.slots[next(it for it in replica.slots if it not in replica.running)]
        replica.slots[model] = None
        return self._pool.activate_s

    def _outcome(self, length_s: float) -> Outcome:
        waits, served = sorted(self._waits), max(1, self._tiers.total())
        shares = {tier: count / served for tier, count in self._tiers.items()}
        return Outcome(
            requests=self._tiers.total(),
            in_slot=shares.get("slot", 0.0),
            in_memory=shares.get("memory", 0.0),
            cold=shares.get("cold", 0.0),
            loads=self._loads,
            refused=self._refused,
            wait_p50_s=_quantile(waits, 0.5),
            wait_p99_s=_quantile(waits, 0.99),
            mean_wait_s=sum(waits) / max(1, len(waits)),
            busy=self._worked_s / (length_s * self._pool.replicas * self._pool.places),
        )


def _quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)] if ordered else 0.0
