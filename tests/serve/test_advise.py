"""The simulator against theory, and the advice against the simulator."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import fmean

import pytest
from typer.testing import CliRunner, Result

from serve.__main__ import app
from serve.access import AccessLog
from serve.advice import Costs, advise, plan, smallest_pool, worth_merging
from serve.advise_command import COLD_MS
from serve.config import LogSettings
from serve.errors import TrafficLogInvalid
from serve.logs import set_up
from serve.queueing import groups_needed, mean_wait_s, wait_quantile_s, waits_at_all
from serve.request_record import RequestRecord
from serve.simulate import Pool, simulate
from serve.traffic import Asked, read_log, zipf

ROOMY = Pool(replicas=1, places=10_000, slots=10_000, resident=10_000, cold_s=0, waiting=10**9)
BASE = Asked("base", rate=3.2, service_s=1.0, tokens=40, adapter=False)


def che(traffic: tuple[Asked, ...], size: int) -> float:
    """Hit rate of an LRU cache by Che's approximation: solved by bisection."""
    low, high = 0.0, 1e9
    for _ in range(200):
        middle = (low + high) / 2
        filled = sum(1 - math.exp(-it.rate * middle) for it in traffic)
        low, high = (low, middle) if filled > size else (middle, high)
    total = sum(it.rate for it in traffic)
    return sum(it.rate * (1 - math.exp(-it.rate * low)) for it in traffic) / total


def test_erlang_s_formula_gives_what_its_tables_give() -> None:
    assert waits_at_all(1, 0.7) == pytest.approx(0.7)  # M/M/1: as much as it is busy
    assert mean_wait_s(1, 0.8, 1.0) == pytest.approx(4.0)  # M/M/1: load ÷ (1 - load)
    assert waits_at_all(2, 1.0) == pytest.approx(1 / 3)
    assert waits_at_all(10, 8.0) == pytest.approx(0.4092, abs=1e-4)
    assert mean_wait_s(2, 2.0, 1.0) == math.inf
    assert wait_quantile_s(1, 0.8, 1.0, 0.5) == pytest.approx(math.log(0.8 / 0.5) / 0.2)


def test_the_fewest_groups_that_meet_a_goal_are_found() -> None:
    needed = groups_needed(4, rate=10, service_s=1.0, goal_s=0.1)

    assert wait_quantile_s(needed * 4, 10, 1.0, 0.99) <= 0.1 < wait_quantile_s((needed - 1) * 4, 10, 1.0, 0.99)


@pytest.mark.parametrize(("places", "load"), [(1, 0.6), (4, 0.7), (16, 0.8)])
def test_simulated_waits_are_those_of_the_queue_of_theory(places: int, load: float) -> None:
    asked, pool = replace(BASE, rate=places * load), replace(ROOMY, places=places)

    outcomes = [simulate(pool, [asked], requests=25_000, seed=seed) for seed in range(4)]

    assert fmean(it.mean_wait_s for it in outcomes) == pytest.approx(mean_wait_s(places, asked.rate, 1.0), rel=0.15)
    expected = wait_quantile_s(places, asked.rate, 1.0, 0.99)
    assert fmean(it.wait_p99_s for it in outcomes) == pytest.approx(expected, rel=0.15)
    assert fmean(it.busy for it in outcomes) == pytest.approx(load, rel=0.02)


def test_hit_rates_of_slots_and_memory_are_those_of_an_lru_cache() -> None:
    traffic = zipf(200, rate=10, exponent=0.9, tokens=1, token_s=1e-5)  # answers too short to hold a place

    outcome = simulate(replace(ROOMY, slots=20, resident=60), traffic, requests=30_000)

    assert outcome.in_slot == pytest.approx(che(traffic, 20), abs=0.015)
    assert outcome.in_slot + outcome.in_memory == pytest.approx(che(traffic, 60), abs=0.015)
    assert outcome.in_slot + outcome.in_memory + outcome.cold == pytest.approx(1)


def test_a_cold_request_waits_for_its_load_and_others_for_the_same_one() -> None:
    traffic = [Asked("first", 1.0, 1e-6, 1), Asked("second", 1.0, 1e-6, 1)]
    cold = replace(ROOMY, resident=1, slots=1, cold_s=0.5)

    outcome = simulate(cold, traffic, requests=400)

    assert outcome.wait_p99_s >= 0.5
    assert outcome.loads < outcome.cold * 400  # cold are those that wait for a load, too
    assert simulate(cold, traffic[:1], requests=400).loads == 0  # the most asked for is there from the beginning


def test_fewer_slots_than_adapters_at_work_make_requests_wait() -> None:
    traffic = zipf(16, rate=8, exponent=0, tokens=40, token_s=0.025)

    tight = simulate(replace(ROOMY, slots=6), traffic, requests=4000)
    enough = simulate(replace(ROOMY, slots=16), traffic, requests=4000)

    assert tight.mean_wait_s > 0.1
    assert enough.mean_wait_s == 0


def test_turns_keep_a_popular_adapter_from_holding_the_only_slot_for_ever() -> None:
    traffic = [Asked("popular", 20.0, 1.0, 1), Asked("rare", 2.0, 1.0, 1)]

    fair = simulate(replace(ROOMY, slots=1, turn_s=1.0), traffic, requests=4000)
    unfair = simulate(replace(ROOMY, slots=1, turn_s=math.inf), traffic, requests=4000)

    assert fair.wait_p99_s < 15  # two turns, and the longest of some forty answers in each
    assert unfair.wait_p99_s > 60


def test_the_same_seed_gives_the_same_result() -> None:
    traffic, pool = zipf(50, 5, 1.0, 20, 0.02), replace(ROOMY, replicas=3, slots=4, resident=10, cold_s=0.1)

    assert simulate(pool, traffic, 2000, seed=7) == simulate(pool, traffic, 2000, seed=7)
    assert simulate(pool, traffic, 2000, seed=7) != simulate(pool, traffic, 2000, seed=8)


def test_more_than_may_wait_are_refused() -> None:
    outcome = simulate(replace(ROOMY, places=1, waiting=5), [replace(BASE, rate=10)], requests=1000)

    assert outcome.refused > 500


COSTS = Costs(
    Pool(1, places=16, slots=64, resident=200, cold_s=0.034), overhead=1.3, goal_s=0.5, requests=4000
)  # fmt: skip


def test_the_smallest_pool_meets_the_goal_and_one_less_does_not() -> None:
    traffic = zipf(40, rate=30, exponent=1, tokens=40, token_s=0.025)

    replicas, outcome, meets = smallest_pool(traffic, COSTS)

    assert meets
    assert outcome.wait_p99_s <= 0.534
    fewer = simulate(replace(COSTS.pool, replicas=replicas - 1), traffic, 4000)
    assert fewer.wait_p99_s > 0.534 or fewer.refused


def test_many_quiet_adapters_are_kept_together() -> None:
    advice = advise(zipf(300, rate=20, exponent=1, tokens=40, token_s=0.025), COSTS)

    assert advice.best.merged == ()
    assert advice.apart.gpus == 300
    assert advice.best.gpus < 10


def test_an_adapter_that_fills_replicas_of_its_own_is_merged_and_the_quiet_ones_are_not() -> None:
    loud = Asked("loud", rate=150, service_s=1.0, tokens=40)
    quiet = [Asked(f"quiet-{n}", rate=0.1, service_s=1.0, tokens=40) for n in range(50)]

    advice = advise([loud, *quiet], COSTS)

    assert advice.best.merged == ("loud",)
    assert advice.best.gpus < advice.together.gpus < advice.apart.gpus
    assert advice.best.per_million_tokens < advice.together.per_million_tokens


def test_without_overhead_nothing_is_worth_merging() -> None:
    traffic = zipf(5, rate=200, exponent=0, tokens=40, token_s=0.025)

    assert worth_merging(traffic, replace(COSTS, overhead=1.0)) == []


def test_the_price_is_that_of_the_gpus_over_the_tokens() -> None:
    traffic = [Asked("one", rate=2.0, service_s=0.1, tokens=500)]

    found = plan(traffic, frozenset({"one"}), replace(COSTS, gpus=2, gpu_hour=3.6))

    assert found.gpus == 2
    assert found.per_million_tokens == pytest.approx(2 * 3.6 / 3600 / 1000 * 1e6)


# The log.


def lines(path: Path, *documents: object) -> Path:
    path.write_text("".join(f"{it if isinstance(it, str) else json.dumps(it)}\n" for it in documents))
    return path


def test_the_server_s_own_access_log_is_read(tmp_path: Path) -> None:
    set_up(LogSettings(directory=tmp_path), "r")
    log = AccessLog(sample=1.0)
    for answered_by, status in [("a@1", 200), ("a@2", 200), ("base", 200), ("a@2", 503), ("", 404)]:
        record = RequestRecord("id", "/v1/completions", adapter="-", answered_by=answered_by, status=status)
        record.began_s -= 2.0
        record.queued_s, record.running_s = record.began_s, record.began_s + 0.5
        log.request_ended(record)

    found = {it.name: it for it in read_log(tmp_path / "r.log", token_s=0.1, sample=1.0, window_s=60)}

    assert set(found) == {"a", "base"}
    assert found["a"].adapter
    assert not found["base"].adapter
    assert found["a"].rate == pytest.approx(2 * found["base"].rate)
    assert found["a"].service_s == pytest.approx(1.5, abs=0.1)
    assert found["a"].tokens == pytest.approx(15, abs=1)


def test_rates_of_a_sampled_log_are_scaled_up(tmp_path: Path) -> None:
    path = lines(tmp_path / "log", *({"time": n, "model": "a", "tokens": 10} for n in range(11)))

    (asked,) = read_log(path, token_s=0.1, sample=0.1, window_s=3600)

    assert asked.rate == pytest.approx(11)
    assert asked.service_s == pytest.approx(1.0)


def test_the_busiest_hour_decides_whatever_the_order_of_the_lines(tmp_path: Path) -> None:
    start, chance = datetime(2026, 1, 1, tzinfo=UTC), random.Random(0)
    quiet = [{"time": (start + timedelta(hours=n)).isoformat(), "model": "quiet", "tokens": 5} for n in range(24)]
    noon = start + timedelta(hours=12, minutes=1)
    busy = [{"time": (noon + timedelta(seconds=n)).isoformat(), "model": "busy", "tokens": 5} for n in range(1800)]
    documents = quiet + busy
    chance.shuffle(documents)

    found = read_log(lines(tmp_path / "log", *documents), 0.1, 1.0, 3600)

    assert [it.name for it in found] == ["busy"] or found[0].name == "busy"
    assert found[0].rate == pytest.approx(0.5)


BAD = {
    "no JSON": ("{", "line 2"),
    "no object": ("[1]", "line 2: list"),
    "no model": ({"time": 1, "tokens": 1}, "lacks 'model'"),
    "no time": ({"model": "a", "tokens": 1}, "lacks 'time'"),
    "no work": ({"time": 1, "model": "a"}, "lacks 'tokens'"),
    "time of another kind": ({"time": "noon", "model": "a", "tokens": 1}, "line 2"),
    "negative": ({"time": 1, "model": "a", "tokens": -1}, "`tokens` is -1"),
    "not a number": ('{"time": 1, "model": "a", "tokens": NaN}', "`tokens` is nan"),
    "text for a number": ({"time": 1, "model": "a", "tokens": "many"}, "`tokens` is 'many'"),
    "name of another kind": ({"time": 1, "model": 5, "tokens": 1}, "name is no text"),
    "nested": ("[" * 100_000, "line 2"),
}


@pytest.mark.parametrize(("line", "told"), BAD.values(), ids=BAD)
def test_a_bad_line_is_named(tmp_path: Path, line: object, told: str) -> None:
    path = lines(tmp_path / "log", {"time": 0, "model": "a", "tokens": 1}, line)

    with pytest.raises(TrafficLogInvalid) as caught:
        read_log(path, 0.1, 1.0, 60)

    assert told in str(caught.value)


def ask(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["advise", *map(str, arguments)])


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xff\xfe\x00", b'{"time": 0, "model": "a", "tokens": 1}\n'])
def test_a_log_without_traffic_is_an_error_of_its_own(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "log").write_bytes(content)

    result = ask("--log", tmp_path / "log")

    assert result.exit_code == 1
    assert "error[traffic_log_invalid]" in result.output


def test_a_missing_log_is_an_error_of_its_own(tmp_path: Path) -> None:
    assert "error[traffic_log_invalid]" in ask("--log", tmp_path / "none").output


def test_the_command_tells_what_to_merge_as_json(tmp_path: Path) -> None:
    loud = ({"time": n / 100, "model": "loud", "tokens": 400} for n in range(3000))
    quiet = ({"time": n, "model": f"quiet-{n}", "tokens": 10} for n in range(30))
    path = lines(tmp_path / "log", *loud, *quiet)

    result = ask("--log", path, "--places", 64, "--max-active-adapters", 32, "--adapter-overhead", 1.4,
                 "--requests", 4000, "--json")  # fmt: skip

    document = json.loads(result.output)
    assert [it["name"] for it in document["merge"]] == ["loud"]
    assert len(document["keep_together"]) == 30
    assert document["plans"]["best"]["gpus"] < document["plans"]["together"]["gpus"]


def test_the_size_of_a_gpu_gives_places_and_memory() -> None:
    result = ask("--model", "llama-3.2-1b", "--gpu", "l4", "--host-gib", 1, "--adapters", 3, "--rate", 1,
                 "--requests", 500, "--json")  # fmt: skip

    pool = json.loads(result.output)["pool"]
    assert pool["resident"] == (1 << 30) // (16 * (4 * 2048 + 2 * 2560 + 3 * 10240) * 16 * 2)
    assert pool["places"] == 256


def test_a_model_that_does_not_fit_is_told() -> None:
    assert "leaves no room" in " ".join(ask("--model", "llama-3.3-70b", "--gpu", "t4").output.split())


def test_the_cost_of_a_cold_start_is_the_measured_one() -> None:
    results = Path(__file__).parents[2] / "benchmarks" / "results" / "swap.json"

    assert pytest.approx(json.loads(results.read_text())["figures"]["cold_minus_warm_ms"]["value"], rel=0.5) == COLD_MS
