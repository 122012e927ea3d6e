from __future__ import annotations

from pathlib import Path

import pytest

from serve.admission import Candidate
from serve.errors import AdapterUnavailable, ArtifactRefused
from serve.store import AdapterStore
from tests.serve.conftest import MakeArtifact, revision


@pytest.fixture
def adapters(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "adapters")


def test_an_adapter_lies_under_its_digest(adapters: AdapterStore, make_artifact: MakeArtifact) -> None:
    artifact = make_artifact("a", weights="pirate weights")
    candidate = Candidate.of(artifact.manifest)
    assert candidate is not None

    adapters.put(artifact)
    adapters.put(artifact)

    path = adapters.path(candidate.adapter)
    assert path.name == candidate.revision
    assert (path / "weights").read_text() == "pirate weights"


def test_the_copy_does_not_follow_the_artifact_when_it_changes(
    adapters: AdapterStore, make_artifact: MakeArtifact
) -> None:
    artifact = make_artifact("a", weights="pirate weights")
    candidate = Candidate.of(artifact.manifest)
    assert candidate is not None
    adapters.put(artifact)

    (artifact.root / "adapter" / "weights").write_text("retrained")

    assert (adapters.path(candidate.adapter) / "weights").read_text() == "pirate weights"


def test_bytes_that_are_not_what_the_manifest_says_never_get_in(
    adapters: AdapterStore, make_artifact: MakeArtifact, tmp_path: Path
) -> None:
    artifact = make_artifact("a")
    (artifact.root / "adapter" / "weights").write_text("tampered")

    with pytest.raises(ArtifactRefused, match="its bytes changed"):
        adapters.put(artifact)

    assert list((tmp_path / "adapters").iterdir()) == []


def test_a_merged_model_is_nothing_to_publish(adapters: AdapterStore, make_artifact: MakeArtifact) -> None:
    with pytest.raises(ArtifactRefused, match="merged model"):
        adapters.put(make_artifact("a", weights=None))


def test_files_that_are_not_there_are_told(adapters: AdapterStore) -> None:
    with pytest.raises(AdapterUnavailable, match="publish it again"):
        adapters.path(revision("pirate", "never put"))
