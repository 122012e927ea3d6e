from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from convert.artifact import (
    Adapter,
    Artifact,
    Manifest,
    Model,
    Origin,
    Route,
    digest,
    file_digests,
    size_bytes,
)
from serve.candidate import Candidate
from serve.names import AdapterRevision
from serve.store import AdapterStore
from tests.serve.fakes import FakeEngine

BASE = "b" * 64

MakeArtifact = Callable[..., Artifact]


def revision(name: str, content: str) -> AdapterRevision:
    return AdapterRevision(name, hashlib.sha256(content.encode()).hexdigest())


def candidate(name: str, content: str) -> Candidate:
    return Candidate(name=name, revision=revision(name, content).revision, base=BASE, rank=8)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def make_artifact(tmp_path: Path) -> MakeArtifact:
    """Artifacts whose weights are a few bytes of text: what the serving side checks is the manifest and the
    digests, and no engine reads these."""

    def make(
        directory: str,
        *,
        name: str = "pirate",
        weights: str | None = "pirate weights",
        base: str = "base weights",
        holds_base: bool = True,
        rank: int = 16,
        source: str = "some-org/Small-Llama",
    ) -> Artifact:
        root = tmp_path / directory
        files = _write(root / "model", base)
        if not holds_base:
            (root / "model" / "weights").unlink()
            (root / "model").rmdir()
        adapter = None
        if weights is not None:
            adapter_files = _write(root / "adapter", weights)
            adapter = Adapter(
                revision=digest(adapter_files), files=adapter_files, rank=rank, size_bytes=size_bytes(root / "adapter")
            )
        manifest = Manifest(
            schema="graft.artifact/1",
            name=name,
            route=Route(name="adapter", requested="auto", merged_onto=None, reason="for a test"),
            origin=Origin(layout="peft", training="qlora", evidence=("for a test",), digest="0" * 64),
            model=Model(
                path="model" if holds_base else None,
                fingerprint=digest(files),
                files=files,
                source=source,
                quantization="nf4-double",
                size_bytes=len(base),
            ),
            adapter=adapter,
            quality=None,
            versions={},
        )
        (root / "manifest.json").write_text(manifest.model_dump_json(by_alias=True))
        return Artifact.open(root)

    return make


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    """A store that holds whatever the test's adapters are called."""

    class AnyAdapter(AdapterStore):
        def path(self, adapter: AdapterRevision) -> Path:
            return tmp_path / adapter.revision

    return AnyAdapter(tmp_path)


def _write(directory: Path, content: str) -> dict[str, str]:
    directory.mkdir(parents=True)
    (directory / "weights").write_text(content)
    return file_digests(directory)
