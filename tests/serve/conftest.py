from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import shutil
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

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
from serve.catalogue.adapter_store import AdapterStore
from serve.catalogue.candidate import Candidate
from serve.catalogue.log import CatalogueLog
from serve.catalogue.storage.object_store import DirectoryStore
from serve.gateway.app import Gateway
from serve.names import AdapterRevision
from tests.object_store import bucket_url, s3_server
from tests.recording_proxy import RecordingProxy, recording_proxy
from tests.serve.fakes import FakeEngine
from tests.serve.virtual_time import SkippableLoop, VirtualTimeLoop

BASE = "b" * 64
MODULE = "model.layers.0.self_attn.q_proj"

MakeArtifact = Callable[..., Artifact]


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """One loop for each test: that of the marker, or asyncio's own."""
    loops = {"virtual_time": VirtualTimeLoop, "skippable_time": SkippableLoop}
    return {"loop": next((loops[name] for name in loops if item.get_closest_marker(name)), asyncio.new_event_loop)}


def revision(name: str, content: str) -> AdapterRevision:
    return AdapterRevision(name, hashlib.sha256(content.encode()).hexdigest())


def candidate(name: str, content: str) -> Candidate:
    return Candidate(name=name, revision=revision(name, content).revision, base=BASE, rank=8)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """The address of a real S3 API server."""
    with s3_server() as endpoint:
        yield endpoint


@pytest.fixture
def url(endpoint: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """A new bucket of that server, which the environment reaches."""
    return bucket_url(endpoint, request.node.name, monkeypatch)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def make_artifact(tmp_path: Path) -> MakeArtifact:
    """Artifacts of a model with one linear layer; `weights` names the content of the adapter's."""

    def make(
        directory: str,
        *,
        name: str = "pirate",
        weights: str | None = "pirate weights",
        base: str = "base weights",
        holds_base: bool = True,
        rank: int = 16,
        source: str = "some-org/Small-Llama",
        golden: str | None = None,
    ) -> Artifact:
        root = tmp_path / directory
        files = write_base(root / "model", base)
        if not holds_base:
            shutil.rmtree(root / "model")
        adapter = None
        if weights is not None:
            write_adapter(root / "adapter", weights, rank)
            adapter_files = file_digests(root / "adapter")
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
                size_bytes=size_bytes(root / "model") if holds_base else 0,
            ),
            adapter=adapter,
            quality=None,
            golden=None if golden is None else hashlib.sha256(golden.encode()).hexdigest(),
            versions={},
        )
        if golden is not None:
            (root / "golden.json").write_text(golden)
        (root / "manifest.json").write_text(manifest.model_dump_json(by_alias=True))
        return Artifact.open(root)

    return make


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    """A store that holds whatever the test's adapters are called."""

    class AnyAdapter(AdapterStore):
        def path(self, adapter: AdapterRevision) -> Path:
            return tmp_path / adapter.revision

    return AnyAdapter(tmp_path, DirectoryStore(tmp_path))


@pytest.fixture
def log(tmp_path: Path) -> CatalogueLog:
    return CatalogueLog(DirectoryStore(tmp_path))


@pytest.fixture
async def gateway(engine: FakeEngine, store: AdapterStore, tmp_path: Path) -> Gateway:
    from tests.serve.one_replica import gateway_of  # it is made of what is here

    return await gateway_of(engine, store, tmp_path)


@pytest.fixture
async def client(gateway: Gateway) -> AsyncIterator[httpx.AsyncClient]:
    from tests.serve.one_replica import calling

    async with calling(gateway) as client:
        yield client


@pytest.fixture(autouse=True)
def awake_loggers() -> None:
    """The check of the layers configures logging, which puts every logger to sleep that was there before."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("serve"):
            logging.getLogger(name).disabled = False


async def verify_nothing(_: Candidate) -> None:
    """The `verify` of a reconciler in tests that are not about verification."""


def write_base(directory: Path, content: str) -> dict[str, str]:
    """A model of one linear layer, 6 outputs by 4 inputs."""
    directory.mkdir(parents=True)
    save_file({f"{MODULE}.weight": _numbers(content, 6, 4)}, directory / "model.safetensors")
    return file_digests(directory)


def write_adapter(directory: Path, content: str, rank: int = 2, **config: Any) -> Path:
    """A PEFT adapter of that model."""
    directory.mkdir(parents=True)
    document = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "base_model_name_or_path": "small"} | config
    (directory / "adapter_config.json").write_text(json.dumps(document))
    factors = {"lora_A": _numbers(content, rank, 4), "lora_B": _numbers(content, 6, rank)}
    write_weights(directory, {f"base_model.model.{MODULE}.{name}.weight": factor for name, factor in factors.items()})
    return directory


def write_weights(directory: Path, tensors: dict[str, NDArray[Any]]) -> None:
    save_file(tensors, directory / "adapter_model.safetensors")


def _numbers(content: str, *shape: int) -> NDArray[Any]:
    """Numbers that are those of this content and no other."""
    seed = int.from_bytes(hashlib.sha256(content.encode()).digest()[:4], "little")
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[RecordingProxy]:
    """A proxy that the environment names: nothing of Graft's may reach it."""
    with recording_proxy() as proxy:
        for name, value in proxy.variables.items():
            monkeypatch.setenv(name, value)
        yield proxy
