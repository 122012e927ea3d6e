"""A machine's copies of the adapters in a bucket: which go when they take too much, and which never do."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from serve.adapters.ingest import ingest_artifact
from serve.adapters.pool import AdapterPool
from serve.adapters.reconcile import Reconciler
from serve.catalogue.adapter_store import AdapterStore
from serve.catalogue.candidate import Candidate
from serve.catalogue.log import CatalogueLog
from serve.catalogue.state_dir import StateDir
from serve.catalogue.storage.bucket_store import BucketStore
from serve.catalogue.storage.object_store import DirectoryStore
from serve.errors import AdapterUnavailable
from serve.names import AdapterRevision
from tests.serve.catalogue.publishing import published
from tests.serve.conftest import MakeArtifact
from tests.serve.fakes import FakeEngine


@pytest.fixture
def revisions(url: str, make_artifact: MakeArtifact, tmp_path: Path) -> list[Candidate]:
    """Six of one name in the bucket, all of the same size; no copy on the machine of the tests."""
    store = StateDir(url, tmp_path / "publisher").publishing_store()
    return [
        ingest_artifact(make_artifact(f"a{number}", name="pirate", weights=str(number)), None, store)
        for number in range(6)
    ]


def copies(directory: Path) -> set[str]:
    return {path.name for path in (directory / "adapters").iterdir() if path.is_dir()}


def machine(url: str, directory: Path, limit: int) -> AdapterStore:
    """The store of a machine with room for `limit` of the revisions, and a half."""
    elsewhere = directory.with_name(f"{directory.name}-measure")
    store = StateDir(url, elsewhere).store
    listing = next(name for name in BucketStore(url).names("adapters") if name.endswith(".json"))
    path = store.path(AdapterRevision("any", listing.removesuffix(".json")))
    size = sum(file.stat().st_size for file in path.iterdir())
    return StateDir(url, directory, local_adapter_bytes=size * limit + size // 2).store


def test_of_many_revisions_the_last_used_stay(url: str, revisions: list[Candidate], tmp_path: Path) -> None:
    store = machine(url, tmp_path / "replica", limit=3)
    for number in (0, 1, 2, 3, 4, 2, 5):
        store.path(revisions[number].adapter)

    assert copies(tmp_path / "replica") == {revisions[number].revision for number in (4, 2, 5)}
    assert store.path(revisions[0].adapter).is_dir(), "one that was removed comes from the bucket again"


async def test_what_an_engine_holds_stays_however_much_it_takes(
    url: str, revisions: list[Candidate], tmp_path: Path, engine: FakeEngine
) -> None:
    store = machine(url, tmp_path / "replica", limit=1)
    pool = AdapterPool(engine, store, capacity=3)
    for candidate in revisions[:3]:
        await pool.load(candidate.adapter)
    assert copies(tmp_path / "replica") == {candidate.revision for candidate in revisions[:3]}

    for candidate in revisions[3:]:
        await pool.load(candidate.adapter)
    assert {candidate.revision for candidate in revisions[3:]} <= copies(tmp_path / "replica")

    await pool.retire([candidate.adapter for candidate in revisions])
    await pool.load(revisions[0].adapter)
    assert copies(tmp_path / "replica") == {revisions[0].revision}


async def test_an_adapter_that_the_engine_refuses_is_held_no_longer(
    url: str, revisions: list[Candidate], tmp_path: Path, engine: FakeEngine
) -> None:
    store = machine(url, tmp_path / "replica", limit=1)
    pool = AdapterPool(engine, store, capacity=3)
    engine.refuses = {revisions[0].adapter}
    with pytest.raises(AdapterUnavailable):
        await pool.load(revisions[0].adapter)

    await pool.load(revisions[1].adapter)

    assert copies(tmp_path / "replica") == {revisions[1].revision}


async def test_what_the_catalogue_needs_goes_last(
    url: str, revisions: list[Candidate], tmp_path: Path, engine: FakeEngine
) -> None:
    """Aliases, the window of a rollback, and what is staged: of an older use than those that nobody needs."""
    log = CatalogueLog(BucketStore(url))
    published(log, *revisions[:4])
    log.stage(revisions[4])
    store = machine(url, tmp_path / "replica", limit=4)
    needed = {revisions[number].revision for number in (2, 3, 4)}
    for number in (2, 3, 4, 0):
        store.path(revisions[number].adapter)
    pool = AdapterPool(engine, store, capacity=8)

    async def verify(_: Candidate) -> None:
        pass

    reconciler = Reconciler("one", log, engine, pool, verify, need_files=store.want)
    await reconciler.start()
    await pool.retire([candidate.adapter for candidate in revisions])
    for number in (0, 1, 5):
        store.path(revisions[number].adapter)

    assert copies(tmp_path / "replica") - {revisions[5].revision} == needed


def hold(url: str, directory: Path, adapter: AdapterRevision, pipe: Connection) -> None:
    StateDir(url, directory, local_adapter_bytes=1).store.hold(adapter)
    pipe.send("held")
    pipe.recv()


def test_a_copy_that_another_process_holds_stays_until_that_process_dies(
    url: str, revisions: list[Candidate], tmp_path: Path
) -> None:
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=hold, args=(url, tmp_path / "replica", revisions[0].adapter, theirs))
    process.start()
    assert ours.poll(60)
    store = StateDir(url, tmp_path / "replica", local_adapter_bytes=1).store

    store.path(revisions[1].adapter)
    assert revisions[0].revision in copies(tmp_path / "replica")

    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    store.path(revisions[2].adapter)
    assert copies(tmp_path / "replica") == {revisions[2].revision}


def test_what_a_killed_download_left_goes_and_what_is_being_downloaded_stays(
    url: str, revisions: list[Candidate], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = StateDir(url, tmp_path / "replica").store
    left = tmp_path / "replica" / "adapters" / f".incoming-{revisions[0].revision}-abcdefgh"
    left.mkdir(parents=True)
    (left / "adapter_model.safetensors").write_bytes(b"half")
    begun, others_done = threading.Event(), threading.Event()
    stream = BucketStore.stream

    def slow(bucket: BucketStore, key: str) -> Iterator[bytes]:
        if revisions[1].revision in key:
            begun.set()
            assert others_done.wait(60)
        return stream(bucket, key)

    monkeypatch.setattr(BucketStore, "stream", slow)
    loader = threading.Thread(target=store.path, args=(revisions[1].adapter,))
    loader.start()
    assert begun.wait(60)
    store.path(revisions[2].adapter)
    others_done.set()
    loader.join()

    assert not left.exists()
    assert copies(tmp_path / "replica") == {revisions[1].revision, revisions[2].revision}


def test_what_a_killed_publisher_left_goes_with_the_next_publish(
    url: str, revisions: list[Candidate], make_artifact: MakeArtifact, tmp_path: Path
) -> None:
    state = StateDir(url, tmp_path / "follower")
    left = tmp_path / "follower" / "publishing" / revisions[0].revision
    left.mkdir(parents=True)
    (left / "adapter_model.safetensors").write_bytes(b"all of it")

    ingest_artifact(make_artifact("new", name="pirate", weights="new"), None, state.publishing_store())

    assert [path for path in (tmp_path / "follower").rglob("*") if path.is_file()] == []


def test_a_directory_without_a_bucket_keeps_every_revision(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    """There these files are the only ones."""
    store = AdapterStore(tmp_path / "adapters", DirectoryStore(tmp_path), max_bytes=1)
    kept = [ingest_artifact(make_artifact(f"a{number}", weights=str(number)), None, store) for number in range(3)]

    for candidate in kept:
        with store.held(candidate.adapter):
            pass

    assert copies(tmp_path) == {candidate.revision for candidate in kept}
