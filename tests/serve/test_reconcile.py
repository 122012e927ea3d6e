from __future__ import annotations

from pathlib import Path

import pytest

from serve.candidate import Candidate
from serve.catalogue import Catalogue, CatalogueLog
from serve.names import AdapterRevision, RequestedModel
from serve.reconcile import Plan, Reconciler, diff
from serve.residency import AdapterPool
from serve.store import AdapterStore
from tests.serve.conftest import candidate
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
def log(tmp_path: Path) -> CatalogueLog:
    return CatalogueLog(tmp_path / "catalogue")


@pytest.fixture
def reconciler(log: CatalogueLog, engine: FakeEngine, store: AdapterStore) -> Reconciler:
    return Reconciler("replica-1", log, engine, AdapterPool(engine, store, capacity=4))


def test_a_changed_revision_is_one_load_and_then_one_retirement(log: CatalogueLog) -> None:
    assert diff(catalogue(log, OLD, staged=(NEW,)), {OLD.adapter}, free=3) == Plan((NEW.adapter,), frozenset())
    log.promote(NEW)
    assert diff(log.read(), {OLD.adapter, NEW.adapter}, free=2) == Plan((), frozenset({OLD.adapter}))


def test_current_adapters_are_loaded_ahead_only_into_free_places(log: CatalogueLog) -> None:
    plan = diff(catalogue(log, OLD, OTHER, staged=(NEW,)), set(), free=2)

    assert plan.load[0] == NEW.adapter
    assert len(plan.load) == 2


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
