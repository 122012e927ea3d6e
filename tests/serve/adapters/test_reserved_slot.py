"""A new revision is checked whatever requests hold, and what it waits for is said."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from convert.artifact import digest
from serve.adapters.pool import AdapterPool
from serve.adapters.publish import check_holding
from serve.adapters.reconcile import Reconciler
from serve.catalogue.adapter_store import AdapterStore
from serve.catalogue.candidate import Candidate
from serve.catalogue.log import CatalogueLog
from serve.catalogue.storage.object_store import DirectoryStore
from serve.errors import AdapterUnavailable, PublishFailed
from serve.names import AdapterRevision
from tests.serve.conftest import candidate, verify_nothing
from tests.serve.fakes import FakeEngine

BUSY, NEW, OTHER = candidate("json", "1"), candidate("pirate", "new"), candidate("french", "1")
TIMEOUT_S = 20  # of a test that hangs


@pytest.fixture
def reconciler(log: CatalogueLog, engine: FakeEngine, store: AdapterStore) -> Reconciler:
    pool = AdapterPool(engine, store, capacity=4, slots=1)
    return Reconciler("replica-1", log, engine, pool, verify_nothing)


async def test_a_revision_is_checked_while_running_requests_hold_every_slot(
    reconciler: Reconciler, log: CatalogueLog
) -> None:
    verified = list[Candidate]()

    async def verify(candidate: Candidate) -> None:
        verified.append(candidate)

    reconciler.verify = verify
    async with asyncio.timeout(TIMEOUT_S), reconciler.pool.use(BUSY.adapter):
        log.stage(NEW)
        report = await reconciler.sync(NEW.adapter.engine_name)

    assert verified == [NEW]
    assert NEW.adapter.engine_name in report.resident


async def test_checks_take_turns_in_the_reserved_slot(reconciler: Reconciler, log: CatalogueLog) -> None:
    running = most = 0

    async def verify(_: Candidate) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1

    reconciler.verify = verify
    log.stage(NEW)
    log.stage(OTHER)
    await asyncio.gather(*(reconciler.sync(staged.adapter.engine_name) for staged in (NEW, OTHER)))

    assert most == 1


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        ("fetch", "the adapter store to send its files"),
        ("load", "the engine to load it"),
        ("verify", "the engine's answers to its check"),
    ],
)
async def test_a_publish_that_takes_too_long_names_the_replica_and_what_it_waits_for(
    reconciler: Reconciler,
    log: CatalogueLog,
    engine: FakeEngine,
    store: AdapterStore,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    expected: str,
) -> None:
    released, fetched = asyncio.Event(), threading.Event()
    read = store.path

    def fetch(adapter: AdapterRevision) -> Path:
        assert step != "fetch" or fetched.wait(TIMEOUT_S)
        return read(adapter)

    async def load(adapter: AdapterRevision, path: Path) -> None:
        await (released.wait() if step == "load" else asyncio.sleep(0))
        engine.resident.add(adapter)

    async def verify(_: Candidate) -> None:
        await (released.wait() if step == "verify" else asyncio.sleep(0))

    monkeypatch.setattr(store, "path", fetch)
    monkeypatch.setattr(engine, "load_adapter", load)
    reconciler.verify = verify
    log.stage(NEW)

    report = await reconciler.sync(NEW.adapter.engine_name, within_s=0.2)
    with pytest.raises(PublishFailed, match=f"Replica replica-1: after 0.2 s it still waits for {expected}"):
        check_holding([report], NEW.adapter)

    released.set()
    fetched.set()
    report = await reconciler.sync(NEW.adapter.engine_name, within_s=TIMEOUT_S)
    check_holding([report], NEW.adapter)


async def test_a_damaged_adapter_is_reported_though_only_a_request_asked_for_it_until_it_loads_again(
    log: CatalogueLog, engine: FakeEngine, tmp_path: Path
) -> None:
    store = AdapterStore(tmp_path, DirectoryStore(tmp_path))
    files = {"adapter_model.safetensors": hashlib.sha256(b"weights").hexdigest()}
    store.put(digest(files), files, lambda _, stream: stream.write(b"weights") and None)
    published = replace(OTHER, revision=digest(files))
    adapter = published.adapter
    reconciler = Reconciler("replica-1", log, engine, AdapterPool(engine, store, capacity=4), verify_nothing)
    log.stage(published)
    log.promote(published)
    await reconciler.sync()
    await reconciler.pool.retire([adapter])
    file = tmp_path / adapter.revision / "adapter_model.safetensors"
    file.chmod(0o600)
    file.write_bytes(b"other weights")

    with pytest.raises(AdapterUnavailable, match="damaged"):
        async with reconciler.pool.use(adapter):
            pass
    report = await reconciler.report()
    assert "damaged" in report.failures[adapter.engine_name]
    assert reconciler.failing == 1

    file.write_bytes(b"weights")
    async with reconciler.pool.use(adapter):
        pass
    assert (await reconciler.report()).failures == {}


async def test_a_failure_of_a_retired_adapter_is_forgotten(
    reconciler: Reconciler, log: CatalogueLog, engine: FakeEngine
) -> None:
    log.stage(OTHER)
    log.promote(OTHER)
    await reconciler.sync()
    await reconciler.pool.retire([OTHER.adapter])
    engine.refuses = {OTHER.adapter}
    with pytest.raises(AdapterUnavailable):
        async with reconciler.pool.use(OTHER.adapter):
            pass
    log.retire(OTHER.name)
    await reconciler.sync()

    assert OTHER.adapter.engine_name not in (await reconciler.report()).failures
