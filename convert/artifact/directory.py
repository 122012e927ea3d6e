"""The directory of an artifact:

    manifest.json    origin, route, quality, and the digest of every file (`manifest`)
    manifest.sig     a signature of the adapter; only where it was signed (`signature`)
    model/           a complete model directory: the merged model, or the base of the adapter
    adapter/         adapter_config.json and adapter_model.safetensors, as PEFT names them; only where the adapter
                     stays separate
    checkpoint/      a recovered LoRA checkpoint; only where the route is `recover`
    golden.json      prompts with the answers that a server of the artifact must give (`golden`)

The base of an adapter may be in another artifact. Then `model.path` in the manifest is None, and `model.fingerprint`
identifies the base.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from convert.artifact.digests import digest, file_digests, file_sha256
from convert.artifact.manifest import SCHEMA, Manifest, problems_of
from convert.errors import ArtifactInvalid

MANIFEST = "manifest.json"
MODEL_DIR = "model"
ADAPTER_DIR = "adapter"
CHECKPOINT_DIR = "checkpoint"
GOLDEN = "golden.json"


@dataclass(frozen=True)
class Artifact:
    """An artifact whose manifest has been read and validated."""

    root: Path
    manifest: Manifest

    @classmethod
    def open(cls, root: Path) -> Artifact:
        """Read the manifest. The other files are not read: `verify` checks them. Raises ArtifactInvalid."""
        path = root / MANIFEST
        if not path.is_file():
            raise ArtifactInvalid(
                f"{root} is not an artifact: it has no {MANIFEST}. "
                "Make one with: python -m convert run CHECKPOINT --base BASE --out DIR"
            )
        try:
            manifest = Manifest.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise ArtifactInvalid(f"{path} does not follow {SCHEMA}: {problems_of(error)}") from error
        return cls(root, manifest)

    @property
    def model_path(self) -> Path | None:
        return self.root / MODEL_DIR if self.manifest.model.path else None

    @property
    def adapter_path(self) -> Path | None:
        return self.root / ADAPTER_DIR if self.manifest.adapter else None

    def verify(self) -> None:
        """Hash every file of the model, the adapter, the checkpoint and the golden answers, and compare with the
        manifest. Raises ArtifactInvalid with every difference."""
        manifest = self.manifest
        problems = [
            *_differences(self.root / MODEL_DIR, manifest.model.files if self.model_path else None),
            *_differences(self.root / ADAPTER_DIR, manifest.adapter.files if manifest.adapter else None),
            *_differences(self.root / CHECKPOINT_DIR, manifest.checkpoint),
            *self._golden_problems(),
            *self._identity_problems(),
        ]
        if problems:
            raise ArtifactInvalid(
                f"{self.root} does not match its manifest: {'; '.join(problems)}. "
                "Convert it again, or copy it again from an undamaged copy."
            )

    def _golden_problems(self) -> list[str]:
        path, expected = self.root / GOLDEN, self.manifest.golden
        if not path.is_file():
            return [f"{GOLDEN} is missing"] if expected else []
        if expected is None:
            return [f"{GOLDEN} is not in the manifest"]
        return [] if file_sha256(path) == expected else [f"{GOLDEN} has other bytes"]

    def _identity_problems(self) -> list[str]:
        manifest = self.manifest
        problems = []
        if digest(manifest.model.files) != manifest.model.fingerprint:
            problems.append("the model's fingerprint is not the digest of its files")
        if manifest.adapter and digest(manifest.adapter.files) != manifest.adapter.revision:
            problems.append("the adapter's revision is not the digest of its files")
        return problems


def _differences(root: Path, expected: Mapping[str, str] | None) -> list[str]:
    """What is wrong in a directory of the artifact; `expected` is None where the manifest has no such directory."""
    if not root.is_dir():
        return [] if expected is None else [f"{root.name}/ is missing"]
    if expected is None:
        return [f"{root.name}/ is not in the manifest"]
    actual = file_digests(root)
    return (
        [f"{root.name}/{path} is missing" for path in sorted(expected.keys() - actual.keys())]
        + [f"{root.name}/{path} is not in the manifest" for path in sorted(actual.keys() - expected.keys())]
        + [
            f"{root.name}/{path} has other bytes"
            for path in sorted(actual.keys() & expected.keys())
            if actual[path] != expected[path]
        ]
    )
