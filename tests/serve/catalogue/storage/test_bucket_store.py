"""The state in a bucket of a real S3 API server on this machine."""

from __future__ import annotations

import multiprocessing
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from convert.artifact import digest
from serve.adapters.ingest import ingest_artifact
from serve.adapters.pool import AdapterPool
from serve.catalogue.log import CatalogueLog
from serve.catalogue.state_dir import StateDir
from serve.catalogue.storage.bucket_store import BucketStore
from serve.errors import AdapterUnavailable, StateInvalid, StoreUnavailable
from serve.names import AdapterRevision
from tests.serve.conftest import MakeArtifact, candidate
from tests.serve.fakes import FakeEngine


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch, url: str) -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{probe.getsockname()[1]}")
    return url


def test_a_key_is_created_once(url: str) -> None:
    bucket = BucketStore(url)

    assert bucket.create("catalogue/1", b"one")
    assert not bucket.create("catalogue/1", b"two")

    assert bucket.read("catalogue/1") == b"one"
    assert bucket.read("catalogue/2") is None
    assert BucketStore(url).names("catalogue") == ["1"]
    bucket.delete("catalogue/1")
    bucket.delete("catalogue/1")
    assert bucket.names("catalogue") == []


def test_writers_that_race_lose_no_entry(url: str) -> None:
    adapters = [candidate(f"adapter-{number}", "weights") for number in range(24)]

    def write(part: slice) -> None:
        log = CatalogueLog(BucketStore(url))
        for each in adapters[part]:
            log.stage(each)
            log.promote(each)

    writers = [threading.Thread(target=write, args=(slice(first, None, 3),)) for first in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()

    catalogue = CatalogueLog(BucketStore(url)).read()
    assert catalogue.current == {adapter.adapter for adapter in adapters}
    assert catalogue.epoch == 2 * len(adapters)


def test_another_machine_gets_an_adapter_from_the_bucket_once(
    url: str, make_artifact: MakeArtifact, tmp_path: Path
) -> None:
    artifact = make_artifact("a", golden="{}")
    published = ingest_artifact(artifact, None, StateDir(url, tmp_path / "one").store)

    elsewhere = StateDir(url, tmp_path / "other").store
    path = elsewhere.path(published.adapter)

    assert path.parent == tmp_path / "other" / "adapters"
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (path / file).read_bytes() == (artifact.root / "adapter" / file).read_bytes()
    assert published.golden is not None
    assert elsewhere.golden(published.golden) == b"{}"


def fetch(url: str, directory: Path, adapter: AdapterRevision, pipe: object) -> None:
    path = StateDir(url, directory).store.path(adapter)
    pipe.send(path.stat().st_ino)  # type: ignore[attr-defined]


def test_processes_of_one_machine_fetch_a_revision_once(url: str, make_artifact: MakeArtifact, tmp_path: Path) -> None:
    published = ingest_artifact(make_artifact("a"), None, StateDir(url, tmp_path / "one").store)
    spawn = multiprocessing.get_context("spawn")
    pipes = [spawn.Pipe() for _ in range(3)]
    processes = [
        spawn.Process(target=fetch, args=(url, tmp_path / "other", published.adapter, theirs)) for _, theirs in pipes
    ]
    for process in processes:
        process.start()
    inodes = {receiver.recv() for receiver, _ in pipes if receiver.poll(60)}
    for process in processes:
        process.join()

    assert len(inodes) == 1
    left = [path.name for path in (tmp_path / "other" / "adapters").iterdir() if not path.name.endswith(".lock")]
    assert left == [published.revision]


def test_whoever_asks_for_a_revision_at_once_waits_for_one_download(
    url: str, make_artifact: MakeArtifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = ingest_artifact(make_artifact("a"), None, StateDir(url, tmp_path / "one").store)
    fetched: list[str] = []
    stream = BucketStore.stream

    def counting(bucket: BucketStore, key: str) -> Iterator[bytes]:
        fetched.append(key.rpartition("/")[2])
        return stream(bucket, key)

    monkeypatch.setattr(BucketStore, "stream", counting)
    askers = [
        threading.Thread(target=StateDir(url, tmp_path / "other").store.path, args=(published.adapter,))
        for _ in range(5)
    ]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()

    assert sorted(fetched) == ["adapter_config.json", "adapter_model.safetensors"]


def test_files_that_were_changed_in_the_bucket_never_reach_the_engine(
    url: str, make_artifact: MakeArtifact, tmp_path: Path
) -> None:
    published = ingest_artifact(make_artifact("a"), None, StateDir(url, tmp_path / "one").store)
    bucket = BucketStore(url)
    key = f"adapters/{published.revision}/adapter_config.json"
    bucket.delete(key)
    bucket.create(key, b"{}")

    with pytest.raises(AdapterUnavailable, match="damaged"):
        StateDir(url, tmp_path / "other").store.path(published.adapter)

    assert not (tmp_path / "other" / "adapters" / published.revision).exists()


def test_a_damaged_copy_on_this_machine_is_fetched_again(url: str, make_artifact: MakeArtifact, tmp_path: Path) -> None:
    artifact = make_artifact("a")
    store = StateDir(url, tmp_path / "one").store
    published = ingest_artifact(artifact, None, store)
    weights = store.path(published.adapter) / "adapter_model.safetensors"
    weights.write_bytes(bytes(len(weights.read_bytes())))

    assert store.path(published.adapter) == weights.parent
    assert weights.read_bytes() == (artifact.root / "adapter" / weights.name).read_bytes()


def test_an_upload_that_did_not_end_is_no_revision(url: str, make_artifact: MakeArtifact, tmp_path: Path) -> None:
    published = ingest_artifact(make_artifact("a"), None, StateDir(url, tmp_path / "one").store)
    BucketStore(url).delete(f"adapters/{published.revision}.json")

    with pytest.raises(AdapterUnavailable, match="publish it again"):
        StateDir(url, tmp_path / "other").store.path(published.adapter)


async def test_a_store_out_of_reach_is_reported_while_what_is_resident_is_served(
    unreachable: str, tmp_path: Path, engine: FakeEngine
) -> None:
    state = StateDir(unreachable, tmp_path)
    resident = AdapterRevision("pirate", digest({}))
    other = candidate("pirate", "2").adapter
    (tmp_path / "adapters" / resident.revision).mkdir(parents=True)
    pool = AdapterPool(engine, state.store, capacity=2)
    await pool.load(resident)

    with pytest.raises(StoreUnavailable, match="Loaded adapters are still served") as caught:
        state.log.read()
    with pytest.raises(StoreUnavailable):
        await pool.load(other)

    assert (caught.value.status, caught.value.retry_after_s) == (503, 5)
    async with pool.use(resident):
        assert engine.resident == {resident}


@pytest.mark.parametrize("url", ["ftp://somewhere/else", "s3://"])
def test_a_url_of_no_known_store_is_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(StateInvalid, match="Expected a directory"):
        _ = StateDir(url, tmp_path).objects
