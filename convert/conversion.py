"""The one verb of this package: a checkpoint and its base go in, a published artifact comes out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from convert.artifact import (
    ADAPTER_DIR,
    MODEL_DIR,
    Adapter,
    Artifact,
    Base,
    Manifest,
    Model,
    Origin,
    Quality,
    Route,
    digest,
    file_sha256,
    size_bytes,
)
from convert.base_model import CONFIG, BaseModel
from convert.checkpoint import Checkpoint
from convert.detect import Detection, Training, detect, told
from convert.errors import QualityGateFailed
from convert.formats import ADAPTER_CONFIG
from convert.journal import identity
from convert.plan import ModelPlan, differing_files, plan_model, require_match, require_room
from convert.progress import Progress, silent
from convert.quality import Text, measure, reference, require_below
from convert.routes.adapter import NormalAdapter, write_adapter
from convert.routes.choose import Choice, choose
from convert.routes.model import write_model
from convert.routes.ways import DtypeOption, QuantizeOption, RouteOption
from convert.shards import SHARD_BYTES
from convert.writer import ArtifactWriter, partial, require_absent

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
    shard_bytes: int = SHARD_BYTES

    @property
    def command(self) -> str:
        """The command line without its route."""
        told = {Training.QLORA: " --trained-on 4bit", Training.LORA: " --trained-on full"}
        word = told.get(self.trained_on, "") if self.trained_on else ""
        return f"python -m convert run {self.checkpoint} --base {self.base} --out {self.destination}{word}"


def convert(request: Request, progress: Progress = silent) -> Artifact:
    """Check everything, write, measure, and publish by one rename. Raises ConvertError; then nothing is left.

    After kill -9, a crash or SIGTERM the same request goes on where that one stopped (`ArtifactWriter`).
    """
    require_absent(request.destination)
    text = Text.open(request.text)
    checkpoint = Checkpoint.open(request.checkpoint)
    checkpoint.require_supported()
    found = _training(request, checkpoint)
    base = BaseModel.open(request.base)
    choice = choose(found, base, request.route, request.quantize, request.command, request.dtype)
    _require_measurable(request, choice)
    require_match(checkpoint, base, merging=choice.way.route == "merge")
    plan = plan_model(base, choice.form, checkpoint) if choice.form else None
    _require_room(request, plan, checkpoint)
    with ArtifactWriter(request.destination, _identity(request, plan, base, checkpoint)) as writer:
        base_files = _write(writer, request, choice, plan, base, checkpoint, progress)
        quality = None
        if choice.measured and request.measure:
            quality = _measure(writer, choice, base, checkpoint, text, progress)
            require_below(quality, request.max_kl)
        return writer.publish(_manifest(writer, request, choice, found, base, checkpoint, base_files, quality))


def _require_room(request: Request, plan: ModelPlan | None, checkpoint: Checkpoint) -> None:
    """What an interrupted conversion left is used or removed: either way it needs no room of its own."""
    left = size_bytes(partial(request.destination))
    require_room(max((plan.weight_bytes if plan else 0) + 2 * checkpoint.weight_bytes - left, 0), request.destination)


def _identity(request: Request, plan: ModelPlan | None, base: BaseModel, checkpoint: Checkpoint) -> str:
    """Of everything the written weights depend on. What only the manifest tells is made anew by every run."""
    inputs = (base.root / CONFIG, *base.tensors.files, checkpoint.root / ADAPTER_CONFIG, *checkpoint.tensors.files)
    files = (*inputs, *plan.files) if plan else inputs
    made = (plan.form, plan.steps) if plan else ()
    return identity(made, checkpoint.pairs, request.shard_bytes, _versions(), files=files)


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
    request: Request,
    choice: Choice,
    plan: ModelPlan | None,
    base: BaseModel,
    checkpoint: Checkpoint,
    progress: Progress,
) -> Mapping[str, str]:
    """Returns the SHA-256 of the base's weight files, by name."""
    base_files: Mapping[str, str] = {}
    if base.artifact:
        known = base.artifact.manifest.model.files
        base_files = {path.name: known[path.name] for path in base.tensors.files if path.name in known}
    if plan:
        directory = writer.directory(MODEL_DIR)
        base_files = write_model(directory, plan, base, checkpoint, progress, writer.journal, request.shard_bytes)
    if choice.way.route == "adapter":
        write_adapter(writer.directory(ADAPTER_DIR), checkpoint, base.source(checkpoint.base_name), progress)
    return base_files


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
    base_files: Mapping[str, str],
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
        base=Base(
            source=base.source(checkpoint.base_name),
            revision=None,
            files={**base_files, CONFIG: file_sha256(base.root / CONFIG)},
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
    files = writer.digests(MODEL_DIR)
    return Model(
        path="model",
        fingerprint=digest(files),
        files=files,
        source=base.source(checkpoint.base_name),
        quantization=choice.form.stored.name if choice.form.stored else "none",
        size_bytes=size_bytes(writer.root / MODEL_DIR),
    )


def _adapter(writer: ArtifactWriter, checkpoint: Checkpoint) -> Adapter:
    files = writer.digests(ADAPTER_DIR)
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
