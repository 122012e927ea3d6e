"""The simulation against queueing theory and against Che's approximation of an LRU cache."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import fmean

import pytest

from serve.capacity.queueing import mean_wait_s, wait_quantile_s
from serve.capacity.simulate import ReplicaPool, simulate
from serve.capacity.traffic import ModelTraffic, zipf

ROOMY = ReplicaPool(replicas=1, places=10_000, slots=10_000, resident=10_000, cold_s=0, waiting=10**9)
BASE = ModelTraffic("base", rate=3.2, service_s=1.0, tokens=40, adapter=False)


def che(traffic: tuple[ModelTraffic, ...], size: int) -> float:
    """Hit rate of an LRU cache by Che's approximation: solved by bisection."""
    low, high = 0.0, 1e9
    for _ in range(200):
        middle = (low + high) / 2
        filled = sum(1 - math.exp(-model.rate * middle) for model in traffic)
        low, high = (low, middle) if filled > size else (middle, high)
    total = sum(model.rate for model in traffic)
    return sum(model.rate * (1 - math.exp(-model.rate * low)) for model in traffic) / total


@pytest.mark.parametrize(("places", "load"), [(1, 0.6), (4, 0.7), (16, 0.8)])
def test_simulated_waits_are_those_of_the_queue_of_theory(places: int, load: float) -> None:
    model, pool = replace(BASE, rate=places * load), replace(ROOMY, places=places)

    results = [simulate(pool, [model], requests=25_000, seed=seed) for seed in range(4)]

    assert fmean(result.mean_wait_s for result in results) == pytest.approx(
        mean_wait_s(places, model.rate, 1.0), rel=0.15
    )
    expected = wait_quantile_s(places, model.rate, 1.0, 0.99)
    assert fmean(result.wait_p99_s for result in results) == pytest.approx(expected, rel=0.15)
    assert fmean(result.busy for result in results) == pytest.approx(load, rel=0.02)


def test_hit_rates_of_slots_and_memory_are_those_of_an_lru_cache() -> None:
    traffic = zipf(200, rate=10, exponent=0.9, tokens=1, token_s=1e-5)  # answers too short to hold a place

    result = simulate(replace(ROOMY, slots=20, resident=60), traffic, requests=30_000)

    assert result.in_slot == pytest.approx(che(traffic, 20), abs=0.015)
    assert result.in_slot + result.in_memory == pytest.approx(che(traffic, 60), abs=0.015)
    assert result.in_slot + result.in_memory + result.cold == pytest.approx(1)


def test_a_cold_request_waits_for_its_load_and_others_for_the_same_one() -> None:
    traffic = [ModelTraffic("first", 1.0, 1e-6, 1), ModelTraffic("second", 1.0, 1e-6, 1)]
    cold = replace(ROOMY, resident=1, slots=1, cold_s=0.5)

    result = simulate(cold, traffic, requests=400)

    assert result.wait_p99_s >= 0.5
    assert result.loads < result.cold * 400  # cold are those that wait for a load, too
    assert simulate(cold, traffic[:1], requests=400).loads == 0  # the busiest one is there from the beginning


def test_fewer_slots_than_adapters_at_work_make_requests_wait() -> None:
    traffic = zipf(16, rate=8, exponent=0, tokens=40, token_s=0.025)

    tight = simulate(replace(ROOMY, slots=6), traffic, requests=4000)
    enough = simulate(replace(ROOMY, slots=16), traffic, requests=4000)

    assert tight.mean_wait_s > 0.1
    assert enough.mean_wait_s == 0


def test_turns_keep_a_popular_adapter_from_holding_the_only_slot_for_ever() -> None:
    traffic = [ModelTraffic("popular", 20.0, 1.0, 1), ModelTraffic("rare", 2.0, 1.0, 1)]

    fair = simulate(replace(ROOMY, slots=1, turn_s=1.0), traffic, requests=4000)
    unfair = simulate(replace(ROOMY, slots=1, turn_s=math.inf), traffic, requests=4000)

    assert fair.wait_p99_s < 15  # two turns, and the longest of some forty answers in each
    assert unfair.wait_p99_s > 60


def test_the_same_seed_gives_the_same_result() -> None:
    traffic, pool = zipf(50, 5, 1.0, 20, 0.02), replace(ROOMY, replicas=3, slots=4, resident=10, cold_s=0.1)

    assert simulate(pool, traffic, 2000, seed=7) == simulate(pool, traffic, 2000, seed=7)
    assert simulate(pool, traffic, 2000, seed=7) != simulate(pool, traffic, 2000, seed=8)


def test_more_than_may_wait_are_refused() -> None:
    result = simulate(replace(ROOMY, places=1, waiting=5), [replace(BASE, rate=10)], requests=1000)

    assert result.refused > 500
