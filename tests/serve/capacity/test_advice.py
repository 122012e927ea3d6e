"""The advice against the simulation."""

from __future__ import annotations

from dataclasses import replace

import pytest

from serve.capacity.advice import Costs, advise, plan_deployments, smallest_pool, worth_merging
from serve.capacity.simulate import ReplicaPool, simulate
from serve.capacity.traffic import ModelTraffic, zipf

COSTS = Costs(
    ReplicaPool(1, places=16, slots=64, resident=200, cold_s=0.034), overhead=1.3, goal_s=0.5, requests=4000
)  # fmt: skip


def test_the_smallest_pool_meets_the_goal_and_one_less_does_not() -> None:
    traffic = zipf(40, rate=30, exponent=1, tokens=40, token_s=0.025)

    replicas, result, meets = smallest_pool(traffic, COSTS)

    assert meets
    assert result.wait_p99_s <= 0.534
    fewer = simulate(replace(COSTS.pool, replicas=replicas - 1), traffic, 4000)
    assert fewer.wait_p99_s > 0.534 or fewer.refused


def test_many_quiet_adapters_are_kept_together() -> None:
    advice = advise(zipf(300, rate=20, exponent=1, tokens=40, token_s=0.025), COSTS)

    assert advice.best.merged == ()
    assert advice.apart.gpus == 300
    assert advice.best.gpus < 10


def test_an_adapter_that_fills_replicas_of_its_own_is_merged_and_the_quiet_ones_are_not() -> None:
    loud = ModelTraffic("loud", rate=150, service_s=1.0, tokens=40)
    quiet = [ModelTraffic(f"quiet-{n}", rate=0.1, service_s=1.0, tokens=40) for n in range(50)]

    advice = advise([loud, *quiet], COSTS)

    assert advice.best.merged == ("loud",)
    assert advice.best.gpus < advice.together.gpus < advice.apart.gpus
    assert advice.best.per_million_tokens < advice.together.per_million_tokens


def test_without_overhead_nothing_is_worth_merging() -> None:
    traffic = zipf(5, rate=200, exponent=0, tokens=40, token_s=0.025)

    assert worth_merging(traffic, replace(COSTS, overhead=1.0)) == []


def test_the_price_is_that_of_the_gpus_over_the_tokens() -> None:
    traffic = [ModelTraffic("one", rate=2.0, service_s=0.1, tokens=500)]

    plan = plan_deployments(traffic, frozenset({"one"}), replace(COSTS, gpus=2, gpu_hour=3.6))

    assert plan.gpus == 2
    assert plan.per_million_tokens == pytest.approx(2 * 3.6 / 3600 / 1000 * 1e6)
