"""Builds the manifest of an artifact: inputs, decisions with their reasons, and outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version

from convert.artifact import (
    ADAPTER_DIR,
    CHECKPOINT_DIR,
    MODEL_DIR,
    Adapter,
    Base,
    Manifest,
    Model,
    Origin,
    Quality,
    Route,
    Trial,
    digest,
    file_digests,
    file_sha256,
    size_bytes,
)
from convert.artifact.file_names import CONFIG
from convert.inputs.adapter_checkpoint import Checkpoint
from convert.inputs.base_model import BaseModel
from convert.pipeline.evaluate import Evaluation
from convert.pipeline.request import PreparedRequest
from convert.plan.side_files import differing_files
from convert.plan.stop_tokens import shared_base_notes
from convert.write.adapter import UniformAdapter
from convert.write.publisher import ArtifactWriter

_LIBRARIES = ("bitsandbytes", "compressed-tensors", "graft", "peft", "safetensors", "torch", "transformers")


@dataclass(frozen=True)
class ManifestBuilder:
    """Builds the manifest. `trials`: the candidates that were built before and did not keep their limits.

    `golden`: SHA-256 of golden.json, None where there is none.
    """

    prepared: PreparedRequest
    name: str
    evaluation: Evaluation
    trials: Sequence[Trial]
    golden: str | None

    def build(self, writer: ArtifactWriter) -> Manifest:
        """The manifest of the files that the writer holds."""
        evaluation, prepared = self.evaluation, self.prepared
        choice = evaluation.candidate.choice
        adapter = writer.root / ADAPTER_DIR
        return Manifest(
            schema="graft.artifact/1",
            name=self.name,
            route=Route(
                name=choice.variant.route,
                requested=prepared.request.route_options.route,
                merged_onto=choice.output_format.merged_onto if choice.output_format else None,
                reason=self._reason(),
            ),
            origin=origin_of(prepared),
            base=base_of(prepared.checkpoint, prepared.base, evaluation.build.base_digests),
            model=self._model(writer),
            adapter=_adapter(writer) if adapter.is_dir() else None,
            checkpoint=file_digests(writer.root / CHECKPOINT_DIR) or None,
            quality=evaluation.quality,
            trials=tuple(self.trials),
            recovery=evaluation.build.recovery,
            notes=self._notes(),
            golden=self.golden,
            versions=versions(),
        )

    def _reason(self) -> str:
        """Why this variant, why not the ones before it, and which files of the checkpoint are not served."""
        candidate = self.evaluation.candidate
        parts = [candidate.choice.reason]
        if self.trials:
            losses = [f"{trial.quantization} ({_loss(trial.quality)})" for trial in self.trials if trial.quality]
            parts.append(f"Tried before, and not chosen: {', '.join(losses)}.")
        if not self.prepared.request.measure and len(self.prepared.open_variants()) > 1:
            parts.append("Nothing was measured, so of the possible variants the one that loses least was taken.")
        if self.evaluation.failures:  # the last variant where Graft chose the limits
            parts.append(f"Nothing keeps all limits: {' '.join(self.evaluation.failures)}")
        # A shared base is served with its own tokenizer and chat template.
        differing = differing_files(self.prepared.checkpoint, self.prepared.base) if candidate.plan is None else ()
        if differing:
            parts.append(f"Served with the base's {', '.join(differing)}, which the checkpoint has in another form.")
        return " ".join(parts)

    def _notes(self) -> tuple[str, ...]:
        """What was corrected or added, and what a shared base does otherwise than the fine-tune's own would."""
        candidate, checkpoint = self.evaluation.candidate, self.prepared.checkpoint
        of_model = candidate.plan.notes if candidate.plan else shared_base_notes(self.prepared.base)
        adapter_note = ""
        if candidate.variant.route == "adapter":
            adapter_note = UniformAdapter.of(checkpoint.lora_weights).note
        return (*checkpoint.warnings, *filter(None, [adapter_note]), *of_model)

    def _model(self, writer: ArtifactWriter) -> Model:
        written = writer.root / MODEL_DIR
        if not written.is_dir():
            base_artifact = self.prepared.base.artifact
            assert base_artifact, "only an artifact's model is referenced"
            return base_artifact.manifest.model.model_copy(update={"path": None})
        files = writer.digests(MODEL_DIR)
        return Model(
            path="model",
            fingerprint=digest(files),
            files=files,
            source=self.prepared.base_source,
            quantization=self.evaluation.quantization,
            quantizer=self.evaluation.build.quantizer,
            size_bytes=size_bytes(written),
        )


def origin_of(prepared: PreparedRequest) -> Origin:
    """The converted checkpoint, as the manifest describes it."""
    return Origin(
        layout=prepared.checkpoint.layout,
        training=prepared.detection.training.value,
        evidence=prepared.detection.sources,
        confidence=prepared.detection.confidence,
        digest=prepared.checkpoint.digest,
    )


def _loss(quality: Quality) -> str:
    kept = (
        "whether it keeps what training changed can't be told on this text"
        if quality.distance_kept is None
        else f"{quality.distance_kept:.1%} of what training changed kept"
    )
    return f"KL {quality.kl_mean:.2g}, {kept}"


def base_of(checkpoint: Checkpoint, base: BaseModel, digests: Mapping[str, str]) -> Base:
    """The base model, as the manifest describes it. `digests`: SHA-256 of weight files that are known already."""
    known = base.artifact.manifest.model.files if base.artifact else digests
    files = (base.root / CONFIG, *base.tensors.files)
    revision = checkpoint.config.get("revision")
    return Base(
        source=base.source(checkpoint.base_name),
        revision=revision if isinstance(revision, str) else None,
        files={path.name: known.get(path.name) or file_sha256(path) for path in files},
    )


def versions() -> dict[str, str]:
    """The versions of the libraries that an artifact depends on."""
    return {library: _version(library) for library in _LIBRARIES}


@cache
def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:  # graft itself, when it runs from its source tree
        return "source"


def _adapter(writer: ArtifactWriter) -> Adapter:
    directory = writer.root / ADAPTER_DIR
    files = writer.digests(ADAPTER_DIR)
    return Adapter(
        revision=digest(files),
        files=files,
        rank=max(Checkpoint.open(directory).ranks),
        size_bytes=size_bytes(directory),
    )
