from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from serve.errors import PublishFailed, PublishUnconfirmed, ReplicaUnreachable
from serve.log import CatalogueLog
from serve.names import RequestedModel
from serve.publish import Control
from serve.reconcile import Reconciler, ReplicaReport
from serve.residency import AdapterPool
from serve.store import AdapterStore
from tests.serve.conftest import believe, candidate
from tests.serve.fakes import FakeEngine

OLD, NEW = candidate("pirate", "old"), candidate("pirate", "new")
ALIAS = RequestedModel("pirate")


class Fleet:
    """Replicas with engines of their own that follow one catalogue."""

    def __init__(self, log: CatalogueLog, store: AdapterStore, size: int) -> None:
        self.engines = [FakeEngine() for _ in range(size)]
        self.reconcilers = [
            Reconciler(f"replica-{number}", log, engine, AdapterPool(engine, store, capacity=4), believe)
            for number, engine in enumerate(self.engines)
        ]
        self.unreachable_from_sync: int | None = None
        self.syncs = 0

    async def sync(self, awaited: str | None = None) -> Sequence[ReplicaReport]:
        self.syncs += 1
        if self.unreachable_from_sync is not None and self.syncs >= self.unreachable_from_sync:
            raise ReplicaUnreachable("replica-1 did not answer")
        return await asyncio.gather(*(reconciler.sync(awaited) for reconciler in self.reconcilers))

    @property
    def answers(self) -> set[object]:
        return {reconciler.catalogue.resolve(ALIAS) for reconciler in self.reconcilers}


@pytest.fixture
async def fleet(log: CatalogueLog, store: AdapterStore) -> Fleet:
    fleet = Fleet(log, store, size=3)
    await Control(log, fleet).publish(OLD)
    fleet.syncs = 0
    return fleet


async def test_every_replica_answers_with_the_new_revision_and_keeps_the_one_before(
    fleet: Fleet, log: CatalogueLog
) -> None:
    published = await Control(log, fleet).publish(NEW)

    assert fleet.answers == {NEW.adapter}
    assert all(engine.resident == {OLD.adapter, NEW.adapter} for engine in fleet.engines)
    assert (published.model, published.revision, published.replicas) == ("pirate", NEW.adapter.engine_name, 3)


async def test_no_replica_switches_before_all_hold_it(fleet: Fleet, log: CatalogueLog) -> None:
    resident_at_switch = []
    promote = log.promote

    def watch(*args: object) -> object:
        resident_at_switch.append([NEW.adapter in engine.resident for engine in fleet.engines])
        return promote(*args)  # type: ignore[arg-type]

    log.promote = watch  # type: ignore[method-assign, assignment]
    await Control(log, fleet).publish(NEW)

    assert resident_at_switch == [[True, True, True]]


async def test_one_replica_that_cannot_load_it_stops_the_publish_with_its_reason(
    fleet: Fleet, log: CatalogueLog
) -> None:
    fleet.engines[1].refuses = {NEW.adapter}

    with pytest.raises(PublishFailed, match=r"Replica replica-1: .*rank too large"):
        await Control(log, fleet).publish(NEW)
    await fleet.sync()

    assert fleet.answers == {OLD.adapter}
    assert all(engine.resident == {OLD.adapter} for engine in fleet.engines)


async def test_a_replica_that_does_not_answer_stops_the_publish(fleet: Fleet, log: CatalogueLog) -> None:
    fleet.unreachable_from_sync = 1

    with pytest.raises(PublishFailed, match="did not answer"):
        await Control(log, fleet).publish(NEW)

    assert log.read().resolve(ALIAS) == OLD.adapter
    assert log.read().staged == frozenset()


async def test_a_replica_lost_after_the_switch_is_told_as_unconfirmed_not_as_failed(
    fleet: Fleet, log: CatalogueLog
) -> None:
    fleet.unreachable_from_sync = 2

    with pytest.raises(PublishUnconfirmed, match="is published"):
        await Control(log, fleet).publish(NEW)

    assert log.read().resolve(ALIAS) == NEW.adapter


async def test_publishing_what_is_current_already_changes_nothing(fleet: Fleet, log: CatalogueLog) -> None:
    await Control(log, fleet).publish(OLD)

    assert fleet.answers == {OLD.adapter}
    assert [engine.loads for engine in fleet.engines] == [[OLD.adapter], [OLD.adapter], [OLD.adapter]]


async def test_nobody_to_publish_to_is_a_failure(log: CatalogueLog, store: AdapterStore) -> None:
    with pytest.raises(PublishFailed, match="No replica is running"):
        await Control(log, Fleet(log, store, size=0)).publish(NEW)
