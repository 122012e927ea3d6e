"""Discrete-event simulation of replicas with adapter slots and host memory. The same seed gives the same result.

It models these rules of the server: a request goes to the replica with the fewest requests, or to one that holds its
adapter and is not much busier. An engine loads one adapter at a time, once for all requests that wait for it, and
evicts the least recently used adapter that is not in use. A batch mixes as many adapters as there are slots, which
change hands when a turn is over. Not modelled: the time of a token depends on the batch, and a request may give up.
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

from serve.capacity.traffic import ModelTraffic

_WARMUP_SHARE = 0.2  # of the requests: nothing is counted before
_SPARE_REQUESTS = 4
_LOADED, _BASE = -1, -2  # in place of the model of an event: a load ended; a request for the base model ended


@dataclass(frozen=True)
class ReplicaPool:
    """A number of equal replicas."""

    replicas: int
    places: int  # requests that an engine runs at a time
    slots: int  # max_active_adapters
    resident: int  # max_resident_adapters
    cold_s: float  # to load an adapter from the store into host memory
    activate_s: float = 0.0  # to load an adapter from host memory into a slot
    turn_s: float = 1.0  # adapter_turn_s
    waiting: int = 128  # max_waiting_requests of each replica


@dataclass(frozen=True)
class SimulationResult:
    """The results for the requests after the warm-up. Shares are of the admitted requests."""

    requests: int  # admitted
    in_slot: float  # share that found its adapter in a slot, or needs none
    in_memory: float  # share that found it in host memory
    cold: float  # share that had to wait for a load
    loads: int  # of adapters into host memory
    refused: int  # because too many waited
    wait_p50_s: float
    wait_p99_s: float
    mean_wait_s: float
    busy: float  # mean share of the places that were in use


def simulate(
    pool: ReplicaPool, traffic: Sequence[ModelTraffic], requests: int, seed: int = 0, limit_s: float = math.inf
) -> SimulationResult:
    """Simulates `requests` arrivals. The adapters with the most requests are in host memory at the beginning.

    With a finite `limit_s` the simulation ends as soon as one request in a hundred is sure to wait longer, or when one
    is refused.
    """
    return _Simulation(pool, traffic, seed, limit_s).run(requests)


@dataclass(frozen=True)
class _Request:
    arrived_s: float
    model: int  # its index in the traffic
    service_s: float
    counted: bool  # False during the warm-up


class _Replica:
    """The state of one replica. Models are indices of the traffic."""

    def __init__(self) -> None:
        self.running: Counter[int] = Counter()  # requests of each adapter in the engine
        self.turn_began_s: dict[int, float] = {}
        self.being_cleared: set[int] = set()  # adapters that run, but get no new request
        self.in_engine = 0
        self.waiting: list[_Request] = []
        self.awaited: Counter[int] = Counter()  # waiting requests of each model
        self.slots: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self.held: OrderedDict[int, float] = OrderedDict()  # when each is ready; least recently used first
        self.loader_free_s = 0.0

    @property
    def requests(self) -> int:
        return self.in_engine + len(self.waiting)


class _Simulation:
    def __init__(self, pool: ReplicaPool, traffic: Sequence[ModelTraffic], seed: int, limit_s: float) -> None:
        self._pool, self._traffic, self._limit_s = pool, traffic, limit_s
        self._random = random.Random(seed)  # noqa: S311  (no secret)
        self._replicas = [_Replica() for _ in range(pool.replicas)]
        self._holders: dict[int, set[int]] = {}  # adapter → replicas that hold it
        self._events: list[tuple[float, int, int, int]] = []  # a heap of time, order, replica, model (or _LOADED)
        self._order = itertools.count()
        self._waits: list[float] = []
        self._tiers: Counter[str] = Counter()
        self._loads = self._refused = self._late = 0
        self._busy_s = 0.0

    def run(self, requests: int) -> SimulationResult:
        self._fill_host_memory()
        cumulative_rates = list(itertools.accumulate(model.rate for model in self._traffic))
        warmup = int(requests * _WARMUP_SHARE)
        now_s = 0.0
        for number in range(requests):
            now_s += self._random.expovariate(cumulative_rates[-1])
            self._advance(now_s)
            self._arrive(self._new_request(now_s, cumulative_rates, counted=number >= warmup))
            if self._is_decided(requests - warmup):
                break
        self._advance(math.inf)
        return self._result(now_s)

    def _new_request(self, now_s: float, cumulative_rates: Sequence[float], counted: bool) -> _Request:
        total_rate = cumulative_rates[-1]
        model = min(bisect(cumulative_rates, self._random.random() * total_rate), len(cumulative_rates) - 1)
        service_s = self._random.expovariate(1 / self._traffic[model].service_s)
        return _Request(now_s, model, service_s, counted)

    def _is_decided(self, counted: int) -> bool:
        """Whether it is sure by now that the limit is not met."""
        return self._late > counted / 100 or (self._refused > 0 and self._limit_s < math.inf)

    def _fill_host_memory(self) -> None:
        adapters = [number for number, model in enumerate(self._traffic) if model.adapter]
        adapters.sort(key=lambda number: self._traffic[number].rate, reverse=True)
        for index, replica in enumerate(self._replicas):
            for adapter in reversed(adapters[: self._pool.resident]):
                replica.held[adapter] = 0.0
                self._holders.setdefault(adapter, set()).add(index)

    def _advance(self, until_s: float) -> None:
        """Processes all events up to that time."""
        while self._events and self._events[0][0] <= until_s:
            now_s, _, index, model = heapq.heappop(self._events)
            replica = self._replicas[index]
            if model != _LOADED:
                replica.in_engine -= 1
            if model >= 0:
                replica.running[model] -= 1
                if not replica.running[model]:
                    del replica.running[model]
            self._dispatch(index, now_s)

    def _arrive(self, request: _Request) -> None:
        index = self._choose_replica(request.model)
        replica = self._replicas[index]
        if len(replica.waiting) >= self._pool.waiting:
            # With a limit a refusal counts during the warm-up as well: a pool that is too small is discarded sooner.
            self._refused += request.counted or self._limit_s < math.inf
            return
        if request.counted:
            self._tiers[self._tier_of(replica, request)] += 1
        replica.waiting.append(request)
        replica.awaited[request.model] += 1
        self._dispatch(index, request.arrived_s)

    def _tier_of(self, replica: _Replica, request: _Request) -> str:
        if not self._traffic[request.model].adapter or request.model in replica.slots:
            return "slot"
        return "memory" if replica.held.get(request.model, math.inf) <= request.arrived_s else "cold"

    def _choose_replica(self, model: int) -> int:
        """The replica with the fewest requests. If the request would have to wait for a slot or evict an adapter there:
        a replica that holds the adapter and is not much busier."""
        offset = self._random.randrange(len(self._replicas))
        in_turn = itertools.chain(range(offset, len(self._replicas)), range(offset))
        first = min(in_turn, key=lambda index: self._replicas[index].requests)
        replica = self._replicas[first]
        if not self._traffic[model].adapter:
            return first
        if not self._lacks_slot(replica, model) if model in replica.held else len(replica.held) < self._pool.resident:
            return first
        holders = [index for index in self._holders.get(model, ()) if self._takes_over(index, replica)]
        return min(holders, key=lambda index: (self._replicas[index].requests, index), default=first)

    def _takes_over(self, index: int, first: _Replica) -> bool:
        """The rule of serve/gateway/routing/peers.py."""
        holder = self._replicas[index]
        return not holder.waiting and holder.in_engine <= 2 * first.in_engine + _SPARE_REQUESTS

    def _dispatch(self, index: int, now_s: float) -> None:
        """Starts the requests that can start, in the order of arrival."""
        replica = self._replicas[index]
        replica.being_cleared = self._adapters_to_clear(replica, now_s)
        position = 0
        while position < len(replica.waiting) and replica.in_engine < self._pool.places:
            request = replica.waiting[position]
            if self._may_start(index, request.model, now_s):
                del replica.waiting[position]
                self._start(index, request, now_s)
            else:
                position += 1

    def _adapters_to_clear(self, replica: _Replica, now_s: float) -> set[int]:
        """As many adapters whose turn is over as other adapters wait for a slot; they get no new requests."""
        if len(replica.running) < self._pool.slots:
            return set()
        models = {request.model for request in replica.waiting}
        without_slot = [model for model in models if model not in replica.running and self._traffic[model].adapter]
        ended = [adapter for adapter in replica.running if now_s - replica.turn_began_s[adapter] > self._pool.turn_s]
        return set(sorted(ended, key=replica.turn_began_s.__getitem__)[: len(without_slot)])

    def _lacks_slot(self, replica: _Replica, adapter: int) -> bool:
        if adapter in replica.running:
            return adapter in replica.being_cleared
        return len(replica.running) >= self._pool.slots

    def _may_start(self, index: int, model: int, now_s: float) -> bool:
        """Whether the model is loaded and has a slot. Begins to load it if that is possible."""
        if not self._traffic[model].adapter:
            return True
        replica = self._replicas[index]
        if model not in replica.held and not self._load(index, model, now_s):
            return False
        return replica.held[model] <= now_s and not self._lacks_slot(replica, model)

    def _load(self, index: int, adapter: int, now_s: float) -> bool:
        """Begins to load an adapter into host memory. False if no other adapter can be evicted for it."""
        replica = self._replicas[index]
        if len(replica.held) >= self._pool.resident and not self._evict(index):
            return False
        ready_s = max(now_s, replica.loader_free_s) + self._pool.cold_s
        replica.held[adapter] = replica.loader_free_s = ready_s
        self._holders.setdefault(adapter, set()).add(index)
        self._loads += 1
        self._add_event(ready_s, index, _LOADED)
        return True

    def _evict(self, index: int) -> bool:
        """Evicts the least recently used adapter that no request runs on or waits for. False if there is none."""
        replica = self._replicas[index]
        unused = (held for held in replica.held if held not in replica.running and not replica.awaited[held])
        evicted = next(unused, None)
        if evicted is None:
            return False
        del replica.held[evicted]
        replica.slots.pop(evicted, None)
        self._holders[evicted].discard(index)
        return True

    def _start(self, index: int, request: _Request, now_s: float) -> None:
        replica, model = self._replicas[index], request.model
        replica.awaited[model] -= 1
        replica.in_engine += 1
        delay_s = self._enter_slot(replica, model, now_s) if self._traffic[model].adapter else 0.0
        if request.counted:
            waited_s = now_s + delay_s - request.arrived_s
            self._waits.append(waited_s)
            self._late += waited_s > self._limit_s
        self._busy_s += delay_s + request.service_s
        ended = model if self._traffic[model].adapter else _BASE
        self._add_event(now_s + delay_s + request.service_s, index, ended)

    def _enter_slot(self, replica: _Replica, adapter: int, now_s: float) -> float:
        """Counts a request of the adapter as running. Returns the seconds until the adapter is in a slot."""
        if adapter not in replica.running:
            replica.turn_began_s[adapter] = now_s
        replica.running[adapter] += 1
        replica.held.move_to_end(adapter)
        if adapter in replica.slots:
            replica.slots.move_to_end(adapter)
            return 0.0
        if len(replica.slots) >= self._pool.slots:
            del replica.slots[next(holder for holder in replica.slots if holder not in replica.running)]
        replica.slots[adapter] = None
        return self._pool.activate_s

    def _add_event(self, at_s: float, index: int, model: int) -> None:
        heapq.heappush(self._events, (at_s, next(self._order), index, model))

    def _result(self, length_s: float) -> SimulationResult:
        waits, served = sorted(self._waits), max(1, self._tiers.total())
        shares = {tier: count / served for tier, count in self._tiers.items()}
        return SimulationResult(
            requests=self._tiers.total(),
            in_slot=shares.get("slot", 0.0),
            in_memory=shares.get("memory", 0.0),
            cold=shares.get("cold", 0.0),
            loads=self._loads,
            refused=self._refused,
            wait_p50_s=_quantile(waits, 0.5),
            wait_p99_s=_quantile(waits, 0.99),
            mean_wait_s=sum(waits) / max(1, len(waits)),
            busy=self._busy_s / (length_s * self._pool.replicas * self._pool.places),
        )


def _quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)] if ordered else 0.0
