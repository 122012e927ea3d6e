from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from serve.adapters.pool import AdapterPool
from serve.adapters.publish import Control, Published
from serve.adapters.reconcile import Reconciler, ReplicaReport
from serve.catalogue.adapter_store import AdapterStore
from serve.catalogue.added_pool import AddedPool
from serve.catalogue.candidate import Candidate
from serve.catalogue.entry import Audit
from serve.catalogue.log import CatalogueLog
from serve.catalogue.pool_changes import add_pool, sleep_pool
from serve.errors import (
    AdapterRejected,
    PublishFailed,
    PublishUnconfirmed,
    ReplicaUnreachable,
    TransitionRefused,
    UnknownModel,
)
from serve.names import RequestedModel
from tests.serve.conftest import candidate, verify_nothing
from tests.serve.fakes import FakeEngine

OLD, NEW = candidate("pirate", "old"), candidate("pirate", "new")
ALIAS = RequestedModel("pirate")


class Fleet:
    """Replicas with engines of their own that follow one catalogue."""

    def __init__(self, log: CatalogueLog, store: AdapterStore, size: int) -> None:
        self.engines = [FakeEngine() for _ in range(size)]
        self.reconcilers = [
            Reconciler(f"replica-{number}", log, engine, AdapterPool(engine, store, capacity=4), verify_nothing)
            for number, engine in enumerate(self.engines)
        ]
        self.unreachable_from_sync: int | None = None
        self.syncs = 0

    async def sync(self, awaited: str | None = None, base: str | None = None) -> Sequence[ReplicaReport]:
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


async def test_a_proof_that_fails_stops_the_publish_though_the_engine_still_holds_the_revision(
    fleet: Fleet, log: CatalogueLog
) -> None:
    async def refuse(_: Candidate) -> None:
        raise AdapterRejected("it changes nothing")

    fleet.reconcilers[1].verify = refuse
    async with fleet.reconcilers[1].pool.use(NEW.adapter):
        with pytest.raises(PublishFailed, match="Replica replica-1: it changes nothing"):
            await Control(log, fleet).publish(NEW)

    assert log.read().resolve(ALIAS) == OLD.adapter


async def test_a_replica_that_does_not_answer_stops_the_publish(fleet: Fleet, log: CatalogueLog) -> None:
    fleet.unreachable_from_sync = 1

    with pytest.raises(PublishFailed, match="did not answer"):
        await Control(log, fleet).publish(NEW)

    assert log.read().resolve(ALIAS) == OLD.adapter
    assert log.read().staged == frozenset()


async def test_a_replica_lost_after_the_switch_is_reported_as_unconfirmed_not_as_failed(
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


async def test_a_rollback_moves_every_replica_back_and_loads_nothing(fleet: Fleet, log: CatalogueLog) -> None:
    control = Control(log, fleet)
    await control.publish(NEW)
    loads = [list(engine.loads) for engine in fleet.engines]

    moved = await control.roll_back("pirate", audit=Audit("ann", "it swears"))

    assert (moved.revision, moved.replicas) == (OLD.adapter.engine_name, 3)
    assert fleet.answers == {OLD.adapter}
    assert [engine.loads for engine in fleet.engines] == loads
    assert (log.history(limit=1)[0][1].verb, log.history(limit=1)[0][1].reason) == ("rollback", "it swears")


async def test_while_its_base_model_sleeps_a_name_is_rolled_back_and_nothing_is_published(
    fleet: Fleet, log: CatalogueLog, tmp_path: Path
) -> None:
    control = Control(log, fleet)
    await control.publish(NEW)
    base = AddedPool(name="zephyr", base=NEW.base, model_path=tmp_path, max_lora_rank=16)
    add_pool(log, base, [], Audit())
    sleep_pool(log, base, Audit())
    reconcilers, fleet.reconcilers = fleet.reconcilers, []  # its engines are stopped

    moved = await control.roll_back("pirate")
    with pytest.raises(PublishFailed, match="Its base model zephyr is asleep: send that a request"):
        await control.publish(candidate("pirate", "newest"))

    assert (moved.revision, moved.replicas) == (OLD.adapter.engine_name, 0)
    assert log.read().resolve(ALIAS) == OLD.adapter
    fleet.reconcilers = reconcilers
    await fleet.sync()
    assert fleet.answers == {OLD.adapter}, "what it loads when it wakes"


async def test_a_rollback_to_what_a_replica_holds_no_more_is_staged_first(fleet: Fleet, log: CatalogueLog) -> None:
    control = Control(log, fleet)
    await control.publish(NEW)
    await control.publish(candidate("pirate", "newest"))
    assert all(OLD.adapter not in engine.resident for engine in fleet.engines)

    await control.roll_back("pirate", OLD.revision[:12])

    assert fleet.answers == {OLD.adapter}
    assert all(OLD.adapter in engine.resident for engine in fleet.engines)


async def test_a_rollback_that_a_replica_cannot_follow_changes_nothing(fleet: Fleet, log: CatalogueLog) -> None:
    control = Control(log, fleet)
    await control.publish(NEW)
    await control.publish(candidate("pirate", "newest"))
    fleet.engines[1].refuses = {OLD.adapter}

    with pytest.raises(PublishFailed, match="rank too large"):
        await control.roll_back("pirate", OLD.revision)

    assert log.read().resolve(ALIAS) == candidate("pirate", "newest").adapter


async def test_there_is_nothing_to_roll_back_to_from_the_first_revision(fleet: Fleet, log: CatalogueLog) -> None:
    with pytest.raises(TransitionRefused, match="nothing to go back to"):
        await Control(log, fleet).roll_back("pirate")
    with pytest.raises(UnknownModel):
        await Control(log, fleet).roll_back("nobody")
    with pytest.raises(UnknownModel):
        await Control(log, fleet).roll_back("pirate", "0" * 12)


async def test_a_staged_revision_waits_on_every_replica_until_it_is_promoted(fleet: Fleet, log: CatalogueLog) -> None:
    control = Control(log, fleet)
    await control.stage(NEW)
    assert fleet.answers == {OLD.adapter}
    assert all(NEW.adapter in engine.resident for engine in fleet.engines)

    await control.promote("pirate", NEW.revision[:12])

    assert fleet.answers == {NEW.adapter}
    assert [engine.loads.count(NEW.adapter) for engine in fleet.engines] == [1, 1, 1]


async def test_what_was_rolled_back_from_can_be_promoted_again(fleet: Fleet, log: CatalogueLog) -> None:
    control = Control(log, fleet)
    await control.publish(NEW)
    await control.roll_back("pirate")

    await control.promote("pirate", NEW.revision)

    assert fleet.answers == {NEW.adapter}


async def test_a_staged_revision_that_is_given_up_leaves_every_replica(fleet: Fleet, log: CatalogueLog) -> None:
    control = Control(log, fleet)
    await control.stage(NEW)

    await control.abandon("pirate", NEW.revision, Audit("ann", "worse"))

    assert all(engine.resident == {OLD.adapter} for engine in fleet.engines)
    with pytest.raises(TransitionRefused, match="abandoned"):
        await control.promote("pirate", NEW.revision)
    with pytest.raises(TransitionRefused, match="not staged"):
        await control.abandon("pirate", NEW.revision)


async def test_a_pinned_revision_stays_when_newer_ones_come(fleet: Fleet, log: CatalogueLog) -> None:
    control = Control(log, fleet)
    assert await control.pin("pirate", None) == OLD.adapter

    for content in "123":
        await control.publish(candidate("pirate", content))
    assert all(OLD.adapter in engine.resident for engine in fleet.engines)

    await control.unpin("pirate", OLD.revision)
    assert not any(OLD.adapter in engine.resident for engine in fleet.engines)


async def test_a_pin_that_a_replica_cannot_keep_is_taken_back(fleet: Fleet, log: CatalogueLog) -> None:
    control = Control(log, fleet)
    await control.publish(NEW)
    await control.publish(candidate("pirate", "newest"))
    fleet.engines[2].refuses = {OLD.adapter}

    with pytest.raises(PublishFailed, match="was not pinned"):
        await control.pin("pirate", OLD.revision)

    assert log.read().pinned == frozenset()


async def test_a_pin_that_is_repeated_while_a_replica_is_unreachable_stays(fleet: Fleet, log: CatalogueLog) -> None:
    control = Control(log, fleet)
    await control.pin("pirate", None)
    fleet.unreachable_from_sync = fleet.syncs + 1

    with pytest.raises(PublishFailed, match="stays pinned"):
        await control.pin("pirate", None)

    assert log.read().pinned == {OLD.adapter}


async def test_publishes_and_rollbacks_that_race_leave_all_replicas_with_one_meaning(
    fleet: Fleet, log: CatalogueLog
) -> None:
    control = Control(log, fleet)
    await control.publish(NEW)
    acts = [control.publish(candidate("pirate", content)) for content in "12"]
    acts += [control.roll_back("pirate"), control.publish(NEW), control.roll_back("pirate")]

    results = await asyncio.gather(*acts, return_exceptions=True)
    await fleet.sync()

    assert all(isinstance(result, Published | PublishFailed | TransitionRefused) for result in results), results
    assert fleet.answers == {log.read().resolve(ALIAS)}
    assert log.read().staged == frozenset()
