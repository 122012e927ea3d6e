"""A few of the faults of `make chaos`, on two real engines with an object store and a Redis."""

from __future__ import annotations

import asyncio

import pytest

from benchmarks.faults.callers import Callers
from benchmarks.faults.run import FaultResult, run
from benchmarks.faults.suite import Fault, copy_corrupted, killed, link_fault, paused
from benchmarks.faults.testbed import testbed

FAULTS = (
    killed("engine"),
    paused("proxy"),
    link_fault("object store", lambda testbed: testbed.store, "silent", 5),
    link_fault("Redis", lambda testbed: testbed.redis, "gone", 3),
    Fault("an adapter's copy corrupted", copy_corrupted),
)
# More than the benchmark allows: the machine may be busy with other work.
HUNG_AFTER_S = 60.0


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[FaultResult]:
    with testbed(tmp_path_factory.mktemp("faults")) as running:
        return asyncio.run(run(running, FAULTS, report=print, hung_after_s=HUNG_AFTER_S))


def test_nothing_is_answered_wrongly_and_nothing_hangs(rows: list[FaultResult]) -> None:
    for row in rows:
        assert row.outcomes["answered"] > 0
        assert {"wrong", "hung", "unclear"}.isdisjoint(row.outcomes), row


def test_what_was_acknowledged_is_not_lost_and_everything_comes_back(rows: list[FaultResult]) -> None:
    assert [row.name for row in rows] == [fault.name for fault in FAULTS], "each fault was recovered from in time"
    assert sum(row.acknowledged for row in rows) > 0
    assert [row.name for row in rows if row.acknowledged_lost] == []


def test_callers_are_refused_only_while_they_cannot_be_counted_or_lose_what_a_killed_engine_had(
    rows: list[FaultResult],
) -> None:
    by_name = {row.name: row for row in rows}
    stored = by_name["object store silent for 5 s"].outcomes
    assert set(stored) == {"answered"}, "resident adapters are served without the object store"
    killed_engine = by_name["engine killed"].outcomes
    lost = sum(count for outcome, count in killed_engine.items() if outcome != "answered")
    assert lost <= Callers.workers, "the other engine answers everything that the killed one had not begun to"
    assert "refused" in by_name["Redis gone for 3 s"].outcomes
