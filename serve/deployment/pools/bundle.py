"""The artifacts that a server is started with: each base model is a pool, with the adapters that were made for it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
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
    """The artifacts of one pool."""

    model_path: Path
    model_name: str
    fingerprint: str
    adapters: tuple[tuple[Candidate, Artifact], ...]

    @property
    def weight_bytes(self) -> int:
        """The weights as they are stored, which is the least that an engine needs for them."""
        return weight_bytes(self.model_path)

    @property
    def max_lora_rank(self) -> int:
        """0 without adapters: the engine then runs without LoRA, which is faster."""
        return max((supported_rank(candidate.rank) for candidate, _ in self.adapters), default=0)


def weight_bytes(model_path: Path) -> int:
    """The weights of a model as they are stored; 0 if it is gone."""
    return sum(file.stat().st_size for file in model_path.glob("*.safetensors"))


def bundles_of(roots: Sequence[Path], base_names: Mapping[Path | None, str] | None = None) -> tuple[Bundle, ...]:
    """Reads and verifies the artifacts: one bundle for each base model, in the order in which they come.

    `base_names`: what clients write to reach a base model, by one of its artifacts, or None for the only base model.
    Raises ArtifactRefused if an artifact is broken, if none of those for one base model holds it, if two models have
    the same name, or if a rank is above what vLLM serves.
    """
    artifacts = [open_verified(root) for root in roots]
    groups: dict[str, list[Artifact]] = {}
    for artifact in artifacts:
        groups.setdefault(artifact.manifest.model.fingerprint, []).append(artifact)
    names = _names_by_base(artifacts, base_names or {})
    bundles = tuple(_bundle(group, names.get(base)) for base, group in groups.items())
    _check_names(bundles)
    return bundles


def _names_by_base(artifacts: Sequence[Artifact], base_names: Mapping[Path | None, str]) -> dict[str, str]:
    """The names that were given, by the fingerprint of their base model. Raises ArtifactRefused."""
    base_of = {artifact.root.resolve(): artifact.manifest.model.fingerprint for artifact in artifacts}
    names = {}
    for root, name in base_names.items():
        if root is None and len(set(base_of.values())) > 1:
            raise ArtifactRefused(
                f"{name!r} can't name all base models of these artifacts: say which with --base-name ARTIFACT={name}."
            )
        if root is not None and root.resolve() not in base_of:
            raise ArtifactRefused(f"--base-name {root}={name}: {root} is none of the artifacts that are to be served.")
        names[base_of[root.resolve()] if root else artifacts[0].manifest.model.fingerprint] = name
    return names


def _bundle(artifacts: Sequence[Artifact], base_name: str | None) -> Bundle:
    """`artifacts`: all for one base model."""
    model_path, base = _base_model(artifacts)
    return Bundle(
        model_path=model_path.resolve(),
        model_name=base_name or _default_name(base),
        fingerprint=base.manifest.model.fingerprint,
        adapters=_adapters(artifacts),
    )


def _check_names(bundles: Sequence[Bundle]) -> None:
    """Raises ArtifactRefused if two models of the server have the same name."""
    base_models: set[str] = set()
    for bundle in bundles:
        if bundle.model_name in base_models:
            raise ArtifactRefused(
                f"Two base models have the name {bundle.model_name!r}, and {bundle.model_path} is one of them: "
                "name it with --base-name ARTIFACT=NAME."
            )
        base_models.add(bundle.model_name)
    taken = set(base_models)
    for candidate, artifact in (adapter for bundle in bundles for adapter in bundle.adapters):
        if candidate.name in taken:
            raise ArtifactRefused(
                f"{artifact.root}: the name {candidate.name!r} is taken already; convert it with another --name."
            )
        taken.add(candidate.name)


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


def _adapters(artifacts: Sequence[Artifact]) -> tuple[tuple[Candidate, Artifact], ...]:
    adapters = []
    for artifact in artifacts:
        candidate = Candidate.of(artifact.manifest, signature=signature_of(artifact.root))
        if candidate is None:
            continue
        if candidate.rank > VLLM_LORA_RANKS[-1]:
            raise ArtifactRefused(
                f"{artifact.root}: its rank {candidate.rank} is above {VLLM_LORA_RANKS[-1]}, the largest that vLLM "
                "serves; merge it instead: python -m convert run … --route merge"
            )
        adapters.append((candidate, artifact))
    return tuple(adapters)
