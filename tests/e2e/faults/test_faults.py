"""A few of the faults of `make chaos`, on two real engines with an object store and a Redis."""

from __future__ import annotations

import asyncio

import pytest

from benchmarks.faults.callers import Callers
from benchmarks.faults.run import Row, run
from benchmarks.faults.suite import Fault, copy_corrupted, killed, link_being, paused
from benchmarks.faults.world import world

FAULTS = (
    killed("engine"),
    paused("proxy"),
    link_being("object store", lambda world: world.store, "silent", 5),
    link_being("Redis", lambda world: world.redis, "gone", 3),
    Fault("an adapter's copy corrupted", copy_corrupted),
)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    with world(tmp_path_factory.mktemp("faults")) as running:
        return asyncio.run(run(running, FAULTS, tell=print))


def test_nothing_is_answered_wrongly_and_nothing_hangs(rows: list[Row]) -> None:
    for row in rows:
        assert row.outcomes["answered"] > 0
        assert {"wrong", "hung", "unclear"}.isdisjoint(row.outcomes), row


def test_what_was_acknowledged_is_not_lost_and_everything_comes_back(rows: list[Row]) -> None:
    assert [row.name for row in rows] == [fault.name for fault in FAULTS], "each was whole again in its time"
    assert sum(row.acknowledged for row in rows) > 0
    assert [row.name for row in rows if row.acknowledged_lost] == []


def test_callers_are_refused_only_while_they_cannot_be_counted_or_lose_what_a_killed_engine_had(
    rows: list[Row],
) -> None:
    by_name = {row.name: row for row in rows}
    stored = by_name["object store silent for 5 s"].outcomes
    assert set(stored) == {"answered"}, "what is resident is served on"
    killed_engine = by_name["engine killed"].outcomes
    lost = sum(count for outcome, count in killed_engine.items() if outcome != "answered")
    assert lost <= Callers.workers, "the other engine answers everything that the killed one had not begun to"
    assert "refused" in by_name["Redis gone for 3 s"].outcomes
