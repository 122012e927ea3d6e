from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from serve.adapters.pool import AdapterPool
from serve.adapters.reconcile import Reconciler
from serve.adapters.residency import ResidencyPlan, plan_residency
from serve.catalogue.adapter_store import AdapterStore
from serve.catalogue.candidate import Candidate
from serve.catalogue.catalogue import Catalogue
from serve.catalogue.entry import Audit
from serve.catalogue.log import CatalogueLog
from serve.errors import AdapterRejected, StoreUnavailable
from serve.names import AdapterRevision, RequestedModel
from tests.serve.conftest import candidate, verify_nothing
from tests.serve.fakes import FakeEngine

OLD, NEW, OTHER = candidate("pirate", "old"), candidate("pirate", "new"), candidate("json", "1")


def catalogue(log: CatalogueLog, *promoted: Candidate, staged: tuple[Candidate, ...] = ()) -> Catalogue:
    for adapter in promoted:
        log.stage(adapter)
        log.promote(adapter)
    for adapter in staged:
        log.stage(adapter)
    return log.read()


@pytest.fixture
def reconciler(log: CatalogueLog, engine: FakeEngine, store: AdapterStore) -> Reconciler:
    return Reconciler("replica-1", log, engine, AdapterPool(engine, store, capacity=4), verify_nothing, keep_previous=0)


def test_a_changed_revision_is_staged_and_then_one_retirement(log: CatalogueLog) -> None:
    staged = plan_residency(catalogue(log, OLD, staged=(NEW,)), {OLD.adapter}, free=3)
    assert staged == ResidencyPlan((NEW.adapter,), (), frozenset())
    log.promote(NEW)
    both = {OLD.adapter, NEW.adapter}
    assert plan_residency(log.read(), both, free=2, keep_previous=0) == ResidencyPlan((), (), frozenset({OLD.adapter}))
    assert plan_residency(log.read(), both, free=2, keep_previous=1) == ResidencyPlan((), (), frozenset())


def test_current_adapters_and_those_before_them_are_loaded_ahead_only_into_free_places(log: CatalogueLog) -> None:
    state = catalogue(log, OLD, NEW, OTHER, staged=(candidate("json", "2"),))

    assert plan_residency(state, set(), free=2).load == (OTHER.adapter,)
    assert plan_residency(state, set(), free=9).load == (OTHER.adapter, NEW.adapter, OLD.adapter)


def test_a_pinned_revision_is_loaded_whatever_it_takes_and_never_let_go(log: CatalogueLog) -> None:
    catalogue(log, OLD, NEW)
    pinned = log.pin(OLD.adapter, most=4)

    assert OLD.adapter in plan_residency(pinned, {NEW.adapter}, free=0, keep_previous=0).load
    assert plan_residency(pinned, {OLD.adapter, NEW.adapter}, free=0, keep_previous=0).retire == frozenset()


async def test_a_slow_staging_holds_up_no_other_adapter(
    reconciler: Reconciler, log: CatalogueLog, engine: FakeEngine
) -> None:
    verifying, verified = asyncio.Event(), asyncio.Event()

    async def verify(_: Candidate) -> None:
        verifying.set()
        await verified.wait()

    reconciler.verify = verify
    catalogue(log, OLD, staged=(OTHER,))
    await reconciler.sync()
    await verifying.wait()
    assert reconciler.catalogue.resolve(RequestedModel("pirate")) == OLD.adapter
    waiting = asyncio.create_task(reconciler.sync(OTHER.adapter.engine_name))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    verified.set()

    assert OTHER.adapter.engine_name in (await waiting).resident


async def test_a_staged_revision_that_fails_its_proof_is_unloaded_and_reported(
    reconciler: Reconciler, log: CatalogueLog, engine: FakeEngine
) -> None:
    async def verify(candidate: Candidate) -> None:
        raise AdapterRejected(f"{candidate.adapter} changes nothing")

    reconciler.verify = verify
    catalogue(log, OLD, staged=(OTHER,))

    report = await reconciler.sync(OTHER.adapter.engine_name)

    assert "changes nothing" in report.failures[OTHER.adapter.engine_name]
    assert engine.resident == {OLD.adapter}


async def test_a_revision_that_failed_its_proof_is_proven_again_though_a_request_still_holds_it(
    reconciler: Reconciler, log: CatalogueLog, engine: FakeEngine
) -> None:
    verdicts: list[str] = []

    async def verify(candidate: Candidate) -> None:
        verdicts.append(candidate.name)
        raise AdapterRejected(f"{candidate.adapter} changes nothing")

    reconciler.verify = verify
    catalogue(log, staged=(OTHER,))
    async with reconciler.pool.use(OTHER.adapter):
        await reconciler.sync(OTHER.adapter.engine_name)
        log.abandon(OTHER, Audit())
        catalogue(log, staged=(OTHER,))
        report = await reconciler.sync(OTHER.adapter.engine_name)

    assert verdicts == ["json", "json"]
    assert OTHER.adapter.engine_name in report.resident
    assert "changes nothing" in report.failures[OTHER.adapter.engine_name]


async def test_a_serving_revision_whose_proof_fails_when_it_is_published_again_stays(
    reconciler: Reconciler, log: CatalogueLog, engine: FakeEngine
) -> None:
    catalogue(log, OLD)
    await reconciler.sync()

    async def verify(candidate: Candidate) -> None:
        raise AdapterRejected("the golden answers are others by now")

    reconciler.verify = verify
    catalogue(log, staged=(OLD,))

    report = await reconciler.sync(OLD.adapter.engine_name)

    assert "golden answers" in report.failures[OLD.adapter.engine_name]
    assert engine.unloads == []


async def test_the_end_of_an_earlier_staging_does_not_give_a_later_one_up(log: CatalogueLog) -> None:
    early, late = (datetime.now(UTC) + timedelta(seconds=seconds) for seconds in (-1, 60))
    log.stage(NEW, until=early)
    log.stage(NEW, until=late)

    assert log.abandon(NEW, Audit("graft", "overdue"), early).staged == {NEW.adapter}
    assert log.abandon(NEW, Audit("graft", "overdue"), late).staged == frozenset()


async def test_what_the_engine_lost_or_should_not_have_is_repaired_and_reported(
    reconciler: Reconciler, log: CatalogueLog, engine: FakeEngine
) -> None:
    catalogue(log, OLD, OTHER)
    await reconciler.sync()
    engine.resident.remove(OLD.adapter)
    engine.unknown_count = 2

    await reconciler.repair_drift()

    assert engine.resident == {OLD.adapter, OTHER.adapter}
    repairs = (await reconciler.report()).repairs
    assert any(f"had lost {OLD.adapter}" in repair for repair in repairs)
    assert any("2 adapters that nobody asked for" in repair for repair in repairs)


async def test_an_audit_of_an_engine_that_holds_what_it_should_reports_nothing(
    reconciler: Reconciler, log: CatalogueLog, engine: FakeEngine
) -> None:
    catalogue(log, OLD)
    await reconciler.sync()
    engine.loads.clear()

    await reconciler.repair_drift()

    assert (engine.loads, engine.unloads, (await reconciler.report()).repairs) == ([], [], ())


async def test_a_staged_revision_whose_coordinator_died_is_given_up_with_its_reason(
    reconciler: Reconciler, log: CatalogueLog, engine: FakeEngine
) -> None:
    catalogue(log, OLD)
    log.stage(NEW, until=datetime.now(UTC) - timedelta(seconds=1))

    await reconciler.follow()

    revision = log.read().revision(NEW.adapter)
    assert revision is not None
    assert (revision.state, revision.by) == ("abandoned", "graft")
    assert "whoever coordinated it is gone" in revision.reason
    assert reconciler.catalogue.epoch == log.read().epoch


async def test_a_replica_waits_for_a_store_out_of_reach_before_it_is_ready(
    reconciler: Reconciler, log: CatalogueLog, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.adapters.reconcile._RETRY_S", 0)
    catalogue(log, OLD)
    load, failures = engine.load_adapter, [StoreUnavailable("out of reach"), StoreUnavailable("out of reach")]

    async def flaky(adapter: AdapterRevision, path: Path) -> None:
        if failures:
            raise failures.pop()
        await load(adapter, path)

    engine.load_adapter = flaky  # type: ignore[method-assign]
    await reconciler.start()

    assert engine.resident == {OLD.adapter}
    assert (await reconciler.report()).failures == {}


async def test_a_new_replica_holds_what_the_catalogue_says_before_it_reports(
    reconciler: Reconciler, log: CatalogueLog, engine: FakeEngine
) -> None:
    catalogue(log, OLD, OTHER)

    report = await reconciler.sync()

    assert engine.resident == {OLD.adapter, OTHER.adapter}
    assert report.resident == (OTHER.adapter.engine_name, OLD.adapter.engine_name)
    assert report.epoch == 4


async def test_requests_see_the_new_revision_only_after_it_was_loaded(
    reconciler: Reconciler, log: CatalogueLog, engine: FakeEngine
) -> None:
    catalogue(log, OLD)
    await reconciler.sync()
    seen_during_load = []
    load = engine.load_adapter

    async def watch(adapter: AdapterRevision, path: Path) -> None:
        seen_during_load.append(reconciler.catalogue.resolve(RequestedModel("pirate")))
        await load(adapter, path)

    engine.load_adapter = watch  # type: ignore[method-assign]
    catalogue(log, NEW)
    await reconciler.sync()

    assert seen_during_load == [OLD.adapter]
    assert reconciler.catalogue.resolve(RequestedModel("pirate")) == NEW.adapter
    assert engine.resident == {NEW.adapter}


async def test_the_old_revision_is_unloaded_only_after_requests_mean_the_new_one(
    reconciler: Reconciler, log: CatalogueLog, engine: FakeEngine
) -> None:
    catalogue(log, OLD)
    await reconciler.sync()
    meant_at_unload = []
    unload = engine.unload_adapter

    async def watch(adapter: AdapterRevision) -> None:
        meant_at_unload.append(reconciler.catalogue.resolve(RequestedModel("pirate")))
        await unload(adapter)

    engine.unload_adapter = watch  # type: ignore[method-assign]
    catalogue(log, NEW)
    await reconciler.sync()

    assert meant_at_unload == [NEW.adapter]


async def test_one_bad_adapter_is_reported_and_blocks_no_other(
    reconciler: Reconciler, log: CatalogueLog, engine: FakeEngine
) -> None:
    engine.refuses = {OLD.adapter}
    catalogue(log, OLD, OTHER)

    report = await reconciler.sync()

    assert engine.resident == {OTHER.adapter}
    assert "rank too large" in report.failures[OLD.adapter.engine_name]


async def test_following_an_unchanged_catalogue_touches_nothing(
    reconciler: Reconciler, log: CatalogueLog, engine: FakeEngine
) -> None:
    catalogue(log, OLD)
    await reconciler.follow()
    engine.loads.clear()

    await reconciler.follow()

    assert engine.loads == []
