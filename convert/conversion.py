"""The one verb of this package: a checkpoint and its base go in, a published artifact comes out."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from convert.artifact import (
    ADAPTER_DIR,
    MODEL_DIR,
    Adapter,
    Artifact,
    Manifest,
    Model,
    Origin,
    Quality,
    Route,
    digest,
    file_digests,
    size_bytes,
)
from convert.base_model import BaseModel
from convert.checkpoint import Checkpoint
from convert.detect import Detection, Training, detect, told
from convert.edits import Edits
from convert.errors import QualityGateFailed
from convert.match import require_match
from convert.plan import ModelPlan, differing_files, plan_model, require_room
from convert.progress import Progress, silent
from convert.quality import Gate, Text, measure, reference
from convert.routes.adapter import NormalAdapter, write_adapter
from convert.routes.choose import Choice, choose, with_baked
from convert.routes.model import write_model
from convert.routes.ways import DtypeOption, QuantizeOption, RouteOption
from convert.writer import ArtifactWriter, require_absent

_LIBRARIES = ("bitsandbytes", "graft", "peft", "safetensors", "torch", "transformers")


@dataclass(frozen=True)
class Request:
    """What the user asks for."""

    checkpoint: Path
    base: Path
    destination: Path
    name: str
    route: RouteOption = "auto"
    quantize: QuantizeOption = "auto"
    dtype: DtypeOption = "auto"
    trained_on: Training | None = None
    text: Path | None = None
    max_kl: float | None = None
    measure: bool = True

    @property
    def command(self) -> str:
        """The command line without its route."""
        told = {Training.QLORA: " --trained-on 4bit", Training.LORA: " --trained-on full"}
        word = told.get(self.trained_on, "") if self.trained_on else ""
        return f"python -m convert run {self.checkpoint} --base {self.base} --out {self.destination}{word}"


def convert(request: Request, progress: Progress = silent) -> Artifact:
    """Check everything, write, measure, and publish by one rename. Raises ConvertError; then nothing is left."""
    require_absent(request.destination)
    text = Text.open(request.text)
    checkpoint = Checkpoint.open(request.checkpoint)
    checkpoint.require_supported()
    found = _training(request, checkpoint)
    base = BaseModel.open(request.base)
    choice = choose(found, base, request.route, request.quantize, request.command, request.dtype)
    checkpoint.require_route(choice.way.route)
    _require_measurable(request, choice)
    require_match(checkpoint, base)
    edits = Edits.of(checkpoint, base, separate=choice.way.route == "adapter")
    choice = with_baked(choice, base, edits)
    plan = plan_model(base, choice.form, checkpoint, edits) if choice.form else None
    require_room((plan.weight_bytes if plan else 0) + 2 * checkpoint.weight_bytes, request.destination)
    with ArtifactWriter(request.destination) as writer:
        _write(writer, choice, plan, base, checkpoint, progress)
        quality = None
        if choice.measured and request.measure:
            quality = _measure(writer, choice, base, checkpoint, text, progress)
            Gate(max_kl=request.max_kl).require(quality)
        return writer.publish(_manifest(writer, request, choice, found, base, checkpoint, quality))


def _training(request: Request, checkpoint: Checkpoint) -> Detection:
    found = detect(checkpoint)
    if request.trained_on:
        found = told(request.trained_on, found)
    return found.require_known(request.checkpoint)


def _require_measurable(request: Request, choice: Choice) -> None:
    """A limit that can't be checked must not look as if it had been."""
    exact = choice.way.route == "adapter" and choice.way.loss.startswith("none")
    if request.max_kl is None or exact or (choice.measured and request.measure):
        return
    raise QualityGateFailed(
        "--max-kl needs a measurement, and there is none: "
        + ("leave out --no-measure." if choice.measured else "give the full-precision base.")
    )


def _write(
    writer: ArtifactWriter,
    choice: Choice,
    plan: ModelPlan | None,
    base: BaseModel,
    checkpoint: Checkpoint,
    progress: Progress,
) -> None:
    if plan:
        write_model(writer.directory(MODEL_DIR), plan, base, checkpoint, progress)
    if choice.way.route == "adapter":
        write_adapter(writer.directory(ADAPTER_DIR), checkpoint, base.source(checkpoint.base_name), progress)


def _measure(
    writer: ArtifactWriter,
    choice: Choice,
    base: BaseModel,
    checkpoint: Checkpoint,
    text: Text,
    progress: Progress,
) -> Quality:
    model = writer.root / MODEL_DIR
    expected = reference(checkpoint, base, choice.quantizer, model, text, progress)
    return measure(expected, model, writer.root / ADAPTER_DIR if choice.way.route == "adapter" else None, progress)


def _manifest(
    writer: ArtifactWriter,
    request: Request,
    choice: Choice,
    found: Detection,
    base: BaseModel,
    checkpoint: Checkpoint,
    quality: Quality | None,
) -> Manifest:
    return Manifest(
        schema="graft.artifact/1",
        name=request.name,
        route=Route(
            name=choice.way.route,
            requested=request.route,
            merged_onto=choice.form.merged_onto if choice.form else None,
            reason=_reason(choice, base, checkpoint),
        ),
        origin=Origin(
            layout=checkpoint.layout,
            training=found.training.value,
            evidence=found.lines,
            digest=checkpoint.digest,
        ),
        model=_model(writer, choice, base, checkpoint),
        adapter=_adapter(writer, checkpoint) if choice.way.route == "adapter" else None,
        quality=quality,
        versions=_versions(),
    )


def _reason(choice: Choice, base: BaseModel, checkpoint: Checkpoint) -> str:
    """A shared base is served with its own tokenizer and chat template: say so where the checkpoint has others."""
    differing = differing_files(checkpoint, base) if choice.form is None else ()
    if not differing:
        return choice.reason
    return f"{choice.reason} Served with the base's {', '.join(differing)}, which the checkpoint has in another form."


def _model(writer: ArtifactWriter, choice: Choice, base: BaseModel, checkpoint: Checkpoint) -> Model:
    if choice.form is None:
        assert base.artifact, "only an artifact's model is referenced"
        return base.artifact.manifest.model.model_copy(update={"path": None})
    files = file_digests(writer.root / MODEL_DIR)
    return Model(
        path="model",
        fingerprint=digest(files),
        files=files,
        source=base.source(checkpoint.base_name),
        quantization=choice.form.stored.name if choice.form.stored else "none",
        size_bytes=size_bytes(writer.root / MODEL_DIR),
    )


def _adapter(writer: ArtifactWriter, checkpoint: Checkpoint) -> Adapter:
    files = file_digests(writer.root / ADAPTER_DIR)
    return Adapter(
        revision=digest(files),
        files=files,
        rank=NormalAdapter.of(checkpoint.pairs).rank,
        size_bytes=size_bytes(writer.root / ADAPTER_DIR),
    )


def _versions() -> dict[str, str]:
    found = {}
    for library in _LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:  # graft itself, when it runs from its source tree
            found[library] = "source"
    return found
