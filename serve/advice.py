"""Which adapters to merge into deployments of their own, and which to keep together: what each plan takes in GPUs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from serve.queueing import groups_needed
from serve.simulate import Outcome, Pool, simulate
from serve.traffic import Asked

# An adapter that fills less of a replica than this is never worth one of its own, whatever its overhead.
_LEAST_FILLED = 0.4
_REQUESTS_A_REPLICA = 100


@dataclass(frozen=True)
class Costs:
    """What is not known from traffic."""

    pool: Pool  # its `replicas` are not looked at
    overhead: float  # a token in a batch of adapters ÷ one of a merged model
    goal_s: float  # what 99 of 100 requests may wait, besides loading
    gpus: int = 1  # of one replica
    gpu_hour: float = 1.0  # in any currency
    requests: int = 20_000  # simulated, at least
    seed: int = 0


@dataclass(frozen=True)
class Alone:
    """A model with a deployment of its own."""

    name: str
    replicas: int
    filled: float  # share of those replicas' places
    pool_share: float  # replicas' worth of work that it was in the pool


@dataclass(frozen=True)
class Plan:
    alone: tuple[Alone, ...]
    pool_replicas: int
    pool: Outcome | None  # None: no pool
    meets_goal: bool
    gpus: int
    per_million_tokens: float

    @property
    def merged(self) -> tuple[str, ...]:
        return tuple(it.name for it in self.alone)


@dataclass(frozen=True)
class Advice:
    """`best` is one of the others, or a mixture of them."""

    together: Plan
    apart: Plan
    best: Plan


def advise(traffic: Sequence[Asked], costs: Costs) -> Advice:
    """Compare one pool for all, a deployment each, and the cheapest mixture of the two that is found."""
    together = plan(traffic, frozenset(), costs)
    apart = plan(traffic, frozenset(it.name for it in traffic), costs)
    merged = frozenset(worth_merging(traffic, costs))
    mixed = plan(traffic, merged, costs) if merged else together
    # Of the same price, the one that meets the goal, then the one with fewer deployments to look after.
    best = min((together, mixed, apart), key=lambda it: (not it.meets_goal, it.gpus, len(it.alone)))
    return Advice(together, apart, best)


def alone(asked: Asked, costs: Costs) -> Alone:
    """What a merged deployment of one model takes: whole replicas, with nobody to share their idle places with."""
    places = costs.pool.places
    service_s = asked.service_s / (costs.overhead if asked.adapter else 1)
    replicas = groups_needed(places, asked.rate, service_s, costs.goal_s)
    return Alone(asked.name, replicas, asked.rate * service_s / (replicas * places), asked.load / places)


def worth_merging(traffic: Sequence[Asked], costs: Costs) -> list[str]:
    """Names of the adapters without which the pool shrinks by more than they take alone; by Erlang's formula."""
    places = costs.pool.places
    candidates = [
        (alone(it, costs), it) for it in traffic if it.adapter and it.load / costs.overhead / places >= _LEAST_FILLED
    ]
    candidates.sort(key=lambda pair: pair[0].replicas / pair[0].pool_share)
    rate, load = sum(it.rate for it in traffic), sum(it.load for it in traffic)
    chosen, spent = 0, 0
    fewest = _pool_estimate(rate, load, costs)
    for count, (own, asked) in enumerate(candidates, 1):
        rate, load, spent = rate - asked.rate, load - asked.load, spent + own.replicas
        total = spent + (_pool_estimate(rate, load, costs) if count < len(traffic) else 0)
        if total < fewest:
            chosen, fewest = count, total
    return [asked.name for _, asked in candidates[:chosen]]


def slots_bound(traffic: Sequence[Asked], costs: Costs, replicas: int) -> bool:
    """Whether a pool of that size is much larger than its places ask for: then it is the slots that are too few."""
    rate, load = sum(it.rate for it in traffic), sum(it.load for it in traffic)
    return replicas > 1.5 * _pool_estimate(rate, load, costs)


def _pool_estimate(rate: float, load: float, costs: Costs) -> int:
    if rate <= 0 or load <= 0:
        return 1
    return groups_needed(costs.pool.places, rate, load / rate, costs.goal_s)


def plan(traffic: Sequence[Asked], merged: frozenset[str], costs: Costs) -> Plan:
    """What it takes if those of `merged` have deployments of their own and all others share a pool."""
    own = tuple(alone(it, costs) for it in traffic if it.name in merged)
    rest = [it for it in traffic if it.name not in merged]
    replicas, outcome, meets = smallest_pool(rest, costs) if rest else (0, None, True)
    gpus = (replicas + sum(it.replicas for it in own)) * costs.gpus
    tokens_s = sum(it.rate * it.tokens for it in traffic)
    price = gpus * costs.gpu_hour / 3600 / tokens_s * 1e6 if tokens_s else math.inf
    return Plan(own, replicas, outcome, meets, gpus, price)


def smallest_pool(traffic: Sequence[Asked], costs: Costs) -> tuple[int, Outcome, bool]:
    """Fewest replicas that meet the goal in a simulation; and whether any number does."""
    load = sum(it.load for it in traffic)
    low = max(1, math.ceil(load / costs.pool.places))
    # With fewer slots than requests, each of another adapter, it is the slots that bound a replica.
    most = 4 * math.ceil(load / min(costs.pool.slots, costs.pool.places)) + 8
    limit_s = costs.goal_s + costs.pool.cold_s + costs.pool.activate_s
    tried: dict[int, Outcome] = {}

    def meets(replicas: int) -> bool:
        tried[replicas] = outcome = _simulated(traffic, replicas, costs, limit_s)
        return not outcome.refused and outcome.wait_p99_s <= limit_s

    failed, replicas = low - 1, low
    while not meets(replicas):
        if replicas >= most:
            return replicas, _simulated(traffic, replicas, costs, math.inf), False
        failed, replicas = replicas, min(most, max(replicas + 1, math.ceil(replicas * 1.3)))
    while replicas - failed > 1:
        middle = (replicas + failed) // 2
        if meets(middle):
            replicas = middle
        else:
            failed = middle
    return replicas, tried[replicas], True


def _simulated(traffic: Sequence[Asked], replicas: int, costs: Costs, limit_s: float) -> Outcome:
    pool = replace(costs.pool, replicas=replicas)
    return simulate(pool, traffic, max(costs.requests, _REQUESTS_A_REPLICA * replicas), costs.seed, limit_s)
