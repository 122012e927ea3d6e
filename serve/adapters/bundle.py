"""The artifacts that one server is started with: one base model, and adapters that were made for it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from convert.artifact import VLLM_LORA_RANKS, Artifact
from convert.artifact.signature import signature_of
from serve.adapters.ingest import open_verified
from serve.catalogue.candidate import Candidate
from serve.errors import ArtifactRefused
from serve.settings import supported_rank


@dataclass(frozen=True)
class Bundle:
    """A set of artifacts that can be served together."""

    model_path: Path
    model_name: str
    fingerprint: str
    adapters: tuple[tuple[Candidate, Artifact], ...]

    @property
    def max_lora_rank(self) -> int:
        """0 without adapters: the engine then runs without LoRA, which is faster."""
        return max((supported_rank(candidate.rank) for candidate, _ in self.adapters), default=0)

    @classmethod
    def of(cls, roots: Sequence[Path], base_name: str | None = None) -> Bundle:
        """Reads and verifies the artifacts.

        Raises ArtifactRefused if one is broken, if they are not made for the same base model, if none holds that base
        model, if two adapters have the same name, or if a rank is above what vLLM serves.
        """
        artifacts = [open_verified(root) for root in roots]
        _check_same_base(artifacts)
        model_path, base = _base_model(artifacts)
        name = base_name or _default_name(base)
        return cls(
            model_path=model_path.resolve(),
            model_name=name,
            fingerprint=base.manifest.model.fingerprint,
            adapters=_adapters(artifacts, name),
        )


def _check_same_base(artifacts: Sequence[Artifact]) -> None:
    fingerprints = {artifact.manifest.model.fingerprint for artifact in artifacts}
    if len(fingerprints) > 1:
        listed = "; ".join(f"{artifact.root}: {artifact.manifest.model.fingerprint[:12]}" for artifact in artifacts)
        raise ArtifactRefused(
            f"These artifacts are made for different base models ({listed}). "
            "A server has one base model: start one for each, on another --port and --state."
        )


def _base_model(artifacts: Sequence[Artifact]) -> tuple[Path, Artifact]:
    """The directory of the base model, and the artifact that holds it."""
    for artifact in artifacts:
        if artifact.model_path:
            return artifact.model_path, artifact
    raise ArtifactRefused(
        f"None of the artifacts holds the base model {artifacts[0].manifest.model.fingerprint[:12]} itself. "
        "Add the artifact whose model/ they were converted with."
    )


def _default_name(base: Artifact) -> str:
    """A merged model keeps its name; a base model is named for the last part of its source."""
    if base.manifest.adapter is None:
        return base.manifest.name
    last = base.manifest.model.source.rstrip("/").rpartition("/")[2].lower()
    return re.sub(r"[^a-z0-9._-]+", "-", last)[:64].strip("-._") or "base"


def _adapters(artifacts: Sequence[Artifact], base_name: str) -> tuple[tuple[Candidate, Artifact], ...]:
    adapters: dict[str, tuple[Candidate, Artifact]] = {}
    for artifact in artifacts:
        candidate = Candidate.of(artifact.manifest, signature=signature_of(artifact.root))
        if candidate is None:
            continue
        if candidate.name == base_name or candidate.name in adapters:
            raise ArtifactRefused(
                f"{artifact.root}: the name {candidate.name!r} is taken already; convert it with another --name."
            )
        if candidate.rank > VLLM_LORA_RANKS[-1]:
            raise ArtifactRefused(
                f"{artifact.root}: its rank {candidate.rank} is above {VLLM_LORA_RANKS[-1]}, the largest that vLLM "
                "serves; merge it instead: python -m convert run … --route merge"
            )
        adapters[candidate.name] = (candidate, artifact)
    return tuple(adapters.values())
