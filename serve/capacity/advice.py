"""Advises which adapters to merge into deployments of their own, and which to serve together in a pool, by the GPUs
that each plan needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from serve.capacity.queueing import groups_needed
from serve.capacity.simulate import ReplicaPool, SimulationResult, simulate
from serve.capacity.traffic import ModelTraffic

# Merging an adapter that uses less of a replica than this is never worth it, whatever its overhead.
_MIN_UTILIZATION = 0.4
_REQUESTS_PER_REPLICA = 100


@dataclass(frozen=True)
class Costs:
    """The assumptions that do not follow from traffic."""

    pool: ReplicaPool  # its `replicas` are ignored
    overhead: float  # time of a token in a batch of adapters ÷ time of one of a merged model
    goal_s: float  # the longest wait of 99 requests in 100, without loading
    gpus: int = 1  # of one replica
    gpu_hour: float = 1.0  # price, in any currency
    requests: int = 20_000  # to simulate, at least
    seed: int = 0


@dataclass(frozen=True)
class DedicatedPlan:
    """A model with a deployment of its own."""

    name: str
    replicas: int
    filled: float  # share of the places of those replicas that is in use
    pool_share: float  # the work of the model in a pool, in replicas


@dataclass(frozen=True)
class DeploymentPlan:
    """Models with deployments of their own, and a pool of replicas for all others."""

    dedicated: tuple[DedicatedPlan, ...]
    pool_replicas: int
    pool: SimulationResult | None  # None: there is no pool
    meets_goal: bool
    gpus: int
    per_million_tokens: float  # price, in the currency of `Costs.gpu_hour`

    @property
    def merged(self) -> tuple[str, ...]:
        return tuple(model.name for model in self.dedicated)


@dataclass(frozen=True)
class Advice:
    """`best` is one of the other two plans, or a mixture of them."""

    together: DeploymentPlan
    apart: DeploymentPlan
    best: DeploymentPlan


def advise(traffic: Sequence[ModelTraffic], costs: Costs) -> Advice:
    """Compares one pool for all models, one deployment for each, and the cheapest mixture that is found."""
    together = plan_deployments(traffic, frozenset(), costs)
    apart = plan_deployments(traffic, frozenset(model.name for model in traffic), costs)
    merged = frozenset(worth_merging(traffic, costs))
    mixed = plan_deployments(traffic, merged, costs) if merged else together
    # A plan that meets the goal, then the cheapest one, then the one with fewer deployments to operate.
    best = min((together, mixed, apart), key=lambda plan: (not plan.meets_goal, plan.gpus, len(plan.dedicated)))
    return Advice(together, apart, best)


def plan_dedicated(model: ModelTraffic, costs: Costs) -> DedicatedPlan:
    """The merged deployment of one model, by Erlang's formula. It takes whole replicas, whose idle places no other
    model can use."""
    places = costs.pool.places
    service_s = model.service_s / (costs.overhead if model.adapter else 1)
    replicas = groups_needed(places, model.rate, service_s, costs.goal_s)
    return DedicatedPlan(model.name, replicas, model.rate * service_s / (replicas * places), model.load / places)


def worth_merging(traffic: Sequence[ModelTraffic], costs: Costs) -> list[str]:
    """The names of the adapters without which the pool, by Erlang's formula, loses more replicas than they take in
    deployments of their own."""
    candidates = _merge_candidates(traffic, costs)
    rate, load = _total(traffic)
    chosen, dedicated_replicas = 0, 0
    fewest = _pool_estimate(rate, load, costs)
    for count, (plan, model) in enumerate(candidates, 1):
        rate, load, dedicated_replicas = rate - model.rate, load - model.load, dedicated_replicas + plan.replicas
        replicas = dedicated_replicas + (_pool_estimate(rate, load, costs) if count < len(traffic) else 0)
        if replicas < fewest:
            chosen, fewest = count, replicas
    return [model.name for _, model in candidates[:chosen]]


def _merge_candidates(traffic: Sequence[ModelTraffic], costs: Costs) -> list[tuple[DedicatedPlan, ModelTraffic]]:
    """The adapters that use enough of a replica, the one that gains most from its own deployment first."""
    places = costs.pool.places
    candidates = [
        (plan_dedicated(model, costs), model)
        for model in traffic
        if model.adapter and model.load / costs.overhead / places >= _MIN_UTILIZATION
    ]
    return sorted(candidates, key=lambda candidate: candidate[0].replicas / candidate[0].pool_share)


def is_bound_by_slots(traffic: Sequence[ModelTraffic], costs: Costs, replicas: int) -> bool:
    """Whether a pool of that size is much larger than its places require. Then its slots are the limit."""
    return replicas > 1.5 * _pool_estimate(*_total(traffic), costs)


def _total(traffic: Sequence[ModelTraffic]) -> tuple[float, float]:
    """Requests a second, and requests at a time."""
    return sum(model.rate for model in traffic), sum(model.load for model in traffic)


def _pool_estimate(rate: float, load: float, costs: Costs) -> int:
    """Replicas of a pool by Erlang's formula, which knows no slots."""
    if rate <= 0 or load <= 0:
        return 1
    return groups_needed(costs.pool.places, rate, load / rate, costs.goal_s)


def plan_deployments(traffic: Sequence[ModelTraffic], merged: frozenset[str], costs: Costs) -> DeploymentPlan:
    """The plan in which the models of `merged` have deployments of their own and all others share a pool."""
    dedicated = tuple(plan_dedicated(model, costs) for model in traffic if model.name in merged)
    shared = [model for model in traffic if model.name not in merged]
    replicas, result, meets_goal = smallest_pool(shared, costs) if shared else (0, None, True)
    gpus = (replicas + sum(model.replicas for model in dedicated)) * costs.gpus
    tokens_s = sum(model.rate * model.tokens for model in traffic)
    price = gpus * costs.gpu_hour / 3600 / tokens_s * 1e6 if tokens_s else math.inf
    return DeploymentPlan(dedicated, replicas, result, meets_goal, gpus, price)


def smallest_pool(traffic: Sequence[ModelTraffic], costs: Costs) -> tuple[int, SimulationResult, bool]:
    """The fewest replicas that meet the goal in a simulation, its result, and whether any number meets the goal."""
    load = sum(model.load for model in traffic)
    lowest = max(1, math.ceil(load / costs.pool.places))
    # Where each request has another adapter, and slots are fewer than places, the slots limit a replica.
    most = 4 * math.ceil(load / min(costs.pool.slots, costs.pool.places)) + 8
    limit_s = costs.goal_s + costs.pool.cold_s + costs.pool.activate_s
    results: dict[int, SimulationResult] = {}

    def meets_goal(replicas: int) -> bool:
        results[replicas] = result = _simulate_pool(traffic, replicas, costs, limit_s)
        return not result.refused and result.wait_p99_s <= limit_s

    too_few, replicas = lowest - 1, lowest
    while not meets_goal(replicas):
        if replicas >= most:
            return replicas, _simulate_pool(traffic, replicas, costs, math.inf), False
        too_few, replicas = replicas, min(most, max(replicas + 1, math.ceil(replicas * 1.3)))
    while replicas - too_few > 1:
        middle = (replicas + too_few) // 2
        if meets_goal(middle):
            replicas = middle
        else:
            too_few = middle
    return replicas, results[replicas], True


def _simulate_pool(traffic: Sequence[ModelTraffic], replicas: int, costs: Costs, limit_s: float) -> SimulationResult:
    pool = replace(costs.pool, replicas=replicas)
    return simulate(pool, traffic, max(costs.requests, _REQUESTS_PER_REPLICA * replicas), costs.seed, limit_s)
