"""What the damaged files belong to: the files that Graft's own programs read, and how they read them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import yaml

from benchmarks.hostile.files import Surface
from convert.artifact import MANIFEST, Artifact
from convert.pipeline.inspect import inspect
from serve.adapters.admission import Admission
from serve.callers.keys import KeyFile
from serve.capacity.traffic import read_log
from serve.catalogue.candidate import Candidate
from serve.catalogue.log import CatalogueLog
from serve.catalogue.storage.object_store import DirectoryStore
from serve.deployment.settings_file import read_settings
from serve.follower.desired_state import DesiredState
from serve.settings import AdmissionSettings, EngineSettings
from serve.settings.admin_tokens import MIN_CHARACTERS, token_digests


def surfaces(artifacts: Mapping[str, Path], work: Path) -> Iterable[Surface]:
    checkpoint, base = (artifacts["first"].parent / name for name in ("checkpoint-first", "base"))
    adapter = artifacts["first"] / "adapter"
    manifest = Artifact.open(artifacts["first"]).manifest
    candidate = Candidate.of(manifest, "french")
    assert candidate is not None
    engine = EngineSettings(
        model_path=artifacts["first"] / "model", model_name="base", fingerprint=candidate.base, max_lora_rank=64
    )
    admission = Admission(lambda: [engine], AdmissionSettings())
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        yield Surface(f"adapter {file}", adapter, file, lambda directory: admission.check(candidate, directory))
    for file in sorted(path.name for path in checkpoint.iterdir() if path.is_file()):
        yield Surface(f"checkpoint {file}", checkpoint, file, lambda directory: inspect(directory, base))
    for file in ("config.json", "tokenizer_config.json", "model.safetensors"):
        if (base / file).exists():
            yield Surface(f"base {file}", base, file, lambda directory: inspect(checkpoint, directory))
    yield Surface("manifest", artifacts["second"], MANIFEST, lambda directory: Artifact.open(directory).verify())
    for file in ("golden.json", "adapter/adapter_model.safetensors", "model/config.json"):
        yield _verified(artifacts["first"], file)
    yield from _configured(artifacts, work)


def _verified(artifact: Path, file: str) -> Surface:
    """Verification must notice every changed byte."""
    whole = (artifact / file).read_bytes()
    return Surface(
        f"artifact {file}",
        artifact,
        file,
        lambda directory: Artifact.open(directory).verify(),
        must_refuse=lambda content: content != whole,
    )


def _admin_token(work: Path) -> Surface:
    directory = work / "good admin token"
    directory.mkdir()
    (directory / "admin.token").write_text("0123456789abcdef0123")
    return Surface(
        "admin token",
        directory,
        "admin.token",
        token_digests,
        must_refuse=lambda content: len(content.strip()) < MIN_CHARACTERS,
    )


def _configured(artifacts: Mapping[str, Path], work: Path) -> Iterable[Surface]:
    """Files that operators write, and files that Graft writes for itself."""
    keys = {"keys": [{"id": "one", "secrets": [{"sha256": "ab" * 32}], "models": ["*"], "limits": {}}]}
    settings = {
        "engine": {"artifact": str(artifacts["first"]), "max_lora_rank": 16},
        "gateway": {"admin_tokens": {"admin": "a" * 64}},
        "state_dir": str(work / "state"),
        "replicas": 2,
    }
    desired = {"adapters": [{"name": "french", "artifact": str(artifacts["second"]), "pin": True}]}
    line = {"time": "2026-01-01T00:00:00+00:00", "model": "french", "tokens": 20}
    lines = "\n".join(json.dumps(line) for _ in itertools.repeat(None, 20))
    for name, file, content, read in (
        ("keys file", "keys.json", json.dumps(keys), lambda directory: KeyFile.read(directory / "keys.json")),
        (
            "settings",
            "settings.yaml",
            json.dumps(settings),
            lambda directory: read_settings(directory / "settings.yaml"),
        ),
        (
            "desired state",
            "adapters.yaml",
            yaml.safe_dump(desired),
            lambda directory: DesiredState.read(directory / "adapters.yaml"),
        ),
        ("traffic log", "log.jsonl", lines, lambda directory: read_log(directory / "log.jsonl", 0.01, 1, 60)),
    ):
        directory = work / f"good {name}"
        directory.mkdir()
        (directory / file).write_text(content)
        yield Surface(name, directory, file, read)
    yield _admin_token(work)
    yield _catalogue(artifacts, work)


def _catalogue(artifacts: Mapping[str, Path], work: Path) -> Surface:
    directory = work / "good catalogue"
    log = CatalogueLog(DirectoryStore(directory))
    candidate = Candidate.of(Artifact.open(artifacts["second"]).manifest, "french")
    assert candidate is not None
    log.stage(candidate)
    log.promote(candidate)
    file = max(directory.rglob("*.json"))
    return Surface(
        "catalogue",
        directory,
        str(file.relative_to(directory)),
        lambda directory: CatalogueLog(DirectoryStore(directory)).read(),
    )
