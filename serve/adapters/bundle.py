"""What a set of artifacts means for one server: one base model, and the adapters that belong to it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from convert.artifact import Artifact
from convert.errors import ArtifactInvalid
from convert.signature import signature_of
from serve.candidate import Candidate
from serve.config import LORA_RANKS, supported_rank
from serve.errors import ArtifactRefused


@dataclass(frozen=True)
class Bundle:
    """Artifacts that can be served together."""

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
        """Read and verify the artifacts. Raises ArtifactRefused if one is broken, if they are not for one and
        the same base model, if none holds that base, or if two adapters have one name."""
        artifacts = [_verified(root) for root in roots]
        _check_one_base(artifacts)
        holder = next((artifact for artifact in artifacts if artifact.model_path), None)
        if holder is None or holder.model_path is None:
            raise ArtifactRefused(
                f"None of the artifacts holds the base model {artifacts[0].manifest.model.fingerprint[:12]} itself. "
                "Add the artifact whose model/ they were converted with."
            )
        name = base_name or _default_name(holder)
        return cls(
            model_path=holder.model_path.resolve(),
            model_name=name,
            fingerprint=holder.manifest.model.fingerprint,
            adapters=_adapters(artifacts, name),
        )


def _verified(root: Path) -> Artifact:
    try:
        artifact = Artifact.open(root)
        artifact.verify()
    except ArtifactInvalid as error:
        raise ArtifactRefused(str(error)) from error
    return artifact


def _check_one_base(artifacts: Sequence[Artifact]) -> None:
    bases = {artifact.manifest.model.fingerprint for artifact in artifacts}
    if len(bases) > 1:
        told = "; ".join(f"{it.root}: {it.manifest.model.fingerprint[:12]}" for it in artifacts)
        raise ArtifactRefused(
            f"These artifacts are made for different base models ({told}). "
            "A server has one base model: start one for each, on another --port and --state."
        )


def _default_name(holder: Artifact) -> str:
    """A merged model goes by its own name; a base by the last part of what it was made from."""
    if holder.manifest.adapter is None:
        return holder.manifest.name
    last = holder.manifest.model.source.rstrip("/").rpartition("/")[2].lower()
    return re.sub(r"[^a-z0-9._-]+", "-", last)[:64].strip("-._") or "base"


def _adapters(artifacts: Sequence[Artifact], base_name: str) -> tuple[tuple[Candidate, Artifact], ...]:
    found: dict[str, tuple[Candidate, Artifact]] = {}
    for artifact in artifacts:
        candidate = Candidate.of(artifact.manifest, signature=signature_of(artifact.root))
        if candidate is None:
            continue
        if candidate.name == base_name or candidate.name in found:
            raise ArtifactRefused(
                f"{artifact.root}: the name {candidate.name!r} is taken already; convert it with another --name."
            )
        if candidate.rank > LORA_RANKS[-1]:
            raise ArtifactRefused(
                f"{artifact.root}: its rank {candidate.rank} is above {LORA_RANKS[-1]}, the largest that vLLM serves; "
                "merge it instead: python -m convert run … --route merge"
            )
        found[candidate.name] = (candidate, artifact)
    return tuple(found.values())
