from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve.adapters.ingest import ingest_artifact
from serve.catalogue.adapter_store import AdapterStore
from serve.catalogue.log import CatalogueLog
from serve.catalogue.storage.object_store import DirectoryStore
from serve.errors import AdapterUnavailable, ArtifactRefused, StoreUnavailable
from tests.serve.conftest import MakeArtifact, candidate, revision

CONFIG = "adapter_config.json"


@pytest.fixture
def adapters(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "adapters", DirectoryStore(tmp_path))


def test_an_adapter_lies_under_its_digest(adapters: AdapterStore, make_artifact: MakeArtifact) -> None:
    artifact = make_artifact("a", weights="pirate weights")

    candidate = ingest_artifact(artifact, None, adapters)
    ingest_artifact(artifact, None, adapters)

    path = adapters.path(candidate.adapter)
    assert path.name == candidate.revision
    assert (path / CONFIG).read_text() == (artifact.root / "adapter" / CONFIG).read_text()


def test_the_copy_does_not_follow_the_artifact_when_it_changes(
    adapters: AdapterStore, make_artifact: MakeArtifact
) -> None:
    artifact = make_artifact("a", weights="pirate weights")
    candidate = ingest_artifact(artifact, None, adapters)

    before = (artifact.root / "adapter" / CONFIG).read_text()

    (artifact.root / "adapter" / CONFIG).write_text("retrained")

    assert (adapters.path(candidate.adapter) / CONFIG).read_text() == before


def test_bytes_that_are_not_what_the_manifest_says_never_get_in(
    adapters: AdapterStore, make_artifact: MakeArtifact, tmp_path: Path
) -> None:
    artifact = make_artifact("a")
    (artifact.root / "adapter" / CONFIG).write_text("tampered")

    with pytest.raises(ArtifactRefused, match="its bytes changed"):
        ingest_artifact(artifact, None, adapters)

    assert list((tmp_path / "adapters").iterdir()) == []


def test_a_merged_model_is_nothing_to_publish(adapters: AdapterStore, make_artifact: MakeArtifact) -> None:
    with pytest.raises(ArtifactRefused, match="merged model"):
        ingest_artifact(make_artifact("a", weights=None), None, adapters)


def test_files_that_are_not_there_are_reported(adapters: AdapterStore) -> None:
    with pytest.raises(AdapterUnavailable, match="publish it again"):
        adapters.path(revision("pirate", "never put"))


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow beyond a few bytes; this holds for root too."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_reported_and_leaves_nothing_behind(
    adapters: AdapterStore, make_artifact: MakeArtifact, tmp_path: Path
) -> None:
    artifact = make_artifact("a")
    log = CatalogueLog(DirectoryStore(tmp_path))
    with full_disk(), pytest.raises(StoreUnavailable, match="Free space"):
        ingest_artifact(artifact, None, adapters)
    with full_disk(), pytest.raises(StoreUnavailable, match="Free space"):
        log.stage(candidate("pirate", "1"))

    assert list((tmp_path / "adapters").iterdir()) == []
    assert list((tmp_path / "catalogue").iterdir()) == []
    taken = ingest_artifact(artifact, None, adapters)
    assert log.stage(taken).staged == {taken.adapter}


def turn_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_files_that_changed_after_they_were_taken_in_are_served_to_nobody(
    adapters: AdapterStore, make_artifact: MakeArtifact
) -> None:
    artifact = make_artifact("a", weights="pirate weights")
    candidate = ingest_artifact(artifact, None, adapters)
    path = adapters.path(candidate.adapter)

    turn_a_bit(path / "adapter_model.safetensors")

    with pytest.raises(AdapterUnavailable, match="damaged; publish it again"):
        adapters.path(candidate.adapter)
    ingest_artifact(artifact, None, adapters)
    assert (path / CONFIG).parent == adapters.path(candidate.adapter)
    assert [directory.name for directory in path.parent.iterdir()] == [candidate.revision], "the damaged ones are gone"


def test_files_are_read_again_only_after_a_change(
    adapters: AdapterStore, make_artifact: MakeArtifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidate = ingest_artifact(make_artifact("a", weights="pirate weights"), None, adapters)
    adapters.path(candidate.adapter)

    monkeypatch.setattr("serve.catalogue.adapter_store.file_digests", lambda _: pytest.fail("read again"))

    adapters.path(candidate.adapter)
