"""The state in an object store, on a real S3 API server of this machine."""

from __future__ import annotations

import multiprocessing
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from convert.artifact import digest
from serve.bucket import Bucket
from serve.errors import AdapterUnavailable, StateInvalid, StoreUnavailable
from serve.intake import take_artifact
from serve.log import CatalogueLog
from serve.names import AdapterRevision
from serve.residency import AdapterPool
from serve.state import StateDir
from tests.object_store import bucket_url, s3_server
from tests.serve.conftest import MakeArtifact, candidate
from tests.serve.fakes import FakeEngine


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with s3_server() as endpoint:
        yield endpoint


@pytest.fixture
def url(endpoint: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    return bucket_url(endpoint, request.node.name, monkeypatch)


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch, url: str) -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{probe.getsockname()[1]}")
    return url


def test_a_key_is_created_once(url: str) -> None:
    bucket = Bucket(url)

    assert bucket.create("catalogue/1", b"one")
    assert not bucket.create("catalogue/1", b"two")

    assert bucket.read("catalogue/1") == b"one"
    assert bucket.read("catalogue/2") is None
    assert Bucket(url).names("catalogue") == ["1"]
    bucket.delete("catalogue/1")
    bucket.delete("catalogue/1")
    assert bucket.names("catalogue") == []


def test_writers_that_race_lose_no_entry(url: str) -> None:
    adapters = [candidate(f"adapter-{number}", "weights") for number in range(24)]

    def write(mine: slice) -> None:
        log = CatalogueLog(Bucket(url))
        for each in adapters[mine]:
            log.stage(each)
            log.promote(each)

    writers = [threading.Thread(target=write, args=(slice(first, None, 3),)) for first in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()

    catalogue = CatalogueLog(Bucket(url)).read()
    assert catalogue.current == {it.adapter for it in adapters}
    assert catalogue.epoch == 2 * len(adapters)


def test_another_machine_gets_an_adapter_from_the_bucket_once(
    url: str, make_artifact: MakeArtifact, tmp_path: Path
) -> None:
    artifact = make_artifact("a", golden="{}")
    published = take_artifact(artifact, None, StateDir(url, tmp_path / "one").store)

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
    published = take_artifact(make_artifact("a"), None, StateDir(url, tmp_path / "one").store)
    spawn = multiprocessing.get_context("spawn")
    pipes = [spawn.Pipe() for _ in range(3)]
    processes = [
        spawn.Process(target=fetch, args=(url, tmp_path / "other", published.adapter, theirs)) for _, theirs in pipes
    ]
    for process in processes:
        process.start()
    inodes = {mine.recv() for mine, _ in pipes if mine.poll(60)}
    for process in processes:
        process.join()

    assert len(inodes) == 1
    left = [it.name for it in (tmp_path / "other" / "adapters").iterdir() if not it.name.endswith(".lock")]
    assert left == [published.revision]


def test_whoever_asks_for_a_revision_at_once_waits_for_one_download(
    url: str, make_artifact: MakeArtifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = take_artifact(make_artifact("a"), None, StateDir(url, tmp_path / "one").store)
    fetched: list[str] = []
    pieces = Bucket.pieces

    def counting(bucket: Bucket, key: str) -> Iterator[bytes]:
        fetched.append(key.rpartition("/")[2])
        return pieces(bucket, key)

    monkeypatch.setattr(Bucket, "pieces", counting)
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
    published = take_artifact(make_artifact("a"), None, StateDir(url, tmp_path / "one").store)
    bucket = Bucket(url)
    key = f"adapters/{published.revision}/adapter_config.json"
    bucket.delete(key)
    bucket.create(key, b"{}")

    with pytest.raises(AdapterUnavailable, match="damaged"):
        StateDir(url, tmp_path / "other").store.path(published.adapter)

    assert not (tmp_path / "other" / "adapters" / published.revision).exists()


def test_a_damaged_copy_on_this_machine_is_fetched_again(url: str, make_artifact: MakeArtifact, tmp_path: Path) -> None:
    artifact = make_artifact("a")
    store = StateDir(url, tmp_path / "one").store
    published = take_artifact(artifact, None, store)
    weights = store.path(published.adapter) / "adapter_model.safetensors"
    weights.write_bytes(bytes(len(weights.read_bytes())))

    assert store.path(published.adapter) == weights.parent
    assert weights.read_bytes() == (artifact.root / "adapter" / weights.name).read_bytes()


def test_an_upload_that_did_not_end_is_no_revision(url: str, make_artifact: MakeArtifact, tmp_path: Path) -> None:
    published = take_artifact(make_artifact("a"), None, StateDir(url, tmp_path / "one").store)
    Bucket(url).delete(f"adapters/{published.revision}.json")

    with pytest.raises(AdapterUnavailable, match="publish it again"):
        StateDir(url, tmp_path / "other").store.path(published.adapter)


async def test_a_store_out_of_reach_is_told_while_what_is_resident_is_served(
    unreachable: str, tmp_path: Path, engine: FakeEngine
) -> None:
    state = StateDir(unreachable, tmp_path)
    resident = AdapterRevision("pirate", digest({}))
    other = candidate("pirate", "2").adapter
    (tmp_path / "adapters" / resident.revision).mkdir(parents=True)
    pool = AdapterPool(engine, state.store, capacity=2)
    await pool.load(resident)

    with pytest.raises(StoreUnavailable, match="What is resident is served on") as told:
        state.log.read()
    with pytest.raises(StoreUnavailable):
        await pool.load(other)

    assert (told.value.status, told.value.retry_after_s) == (503, 5)
    async with pool.use(resident):
        assert engine.resident == {resident}


@pytest.mark.parametrize("url", ["ftp://somewhere/else", "s3://"])
def test_a_url_of_no_known_store_is_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(StateInvalid, match="Expected a directory"):
        _ = StateDir(url, tmp_path).objects
