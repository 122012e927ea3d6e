"""The main verb of this package: a checkpoint and its base go in, a published artifact comes out."""

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
    Route,
    Trial,
    digest,
    file_digests,
    file_sha256,
    size_bytes,
)
from convert.base_model import CONFIG, BaseModel
from convert.checkpoint import Checkpoint
from convert.errors import ConvertError, QualityGateFailed
from convert.formats import ADAPTER_CONFIG
from convert.journal import identity
from convert.making import CHECKPOINT_DIR
from convert.plan import differing_files, require_room
from convert.preparation import Candidate, Job, Request, prepare
from convert.progress import Progress, silent
from convert.quality import Gate
from convert.trial import Bench, Outcome
from convert.writer import ArtifactWriter, partial, require_absent

_LIBRARIES = ("bitsandbytes", "compressed-tensors", "graft", "peft", "safetensors", "torch", "transformers")

# What `auto` calls good enough where the user sets no limits.
AUTO_GATE = Gate(max_kl=0.05, min_gain=0.95, lenient=True)


@dataclass(frozen=True)
class Destination:
    """Where the artifact appears, and the name it is served under."""

    path: Path
    name: str


def convert(request: Request, destination: Destination, progress: Progress = silent) -> Artifact:
    """Check everything, write, measure, and publish by one rename. Raises ConvertError; then nothing is left.

    After kill -9, a crash or SIGTERM the same request goes on where that one stopped (`ArtifactWriter`).
    Where the form is left open, forms are made and measured one after the other, smallest first, until one passes.
    """
    require_absent(destination.path)
    job = prepare(request, progress)
    ways = job.open_ways()
    gate = gate_of(request, len(ways))
    failed: list[Trial] = []
    bench = Bench(job, gate, progress)
    for number, way in enumerate(ways, start=1):
        is_last = number == len(ways)
        try:
            candidate = job.candidate(way)
        except ConvertError:
            if is_last:
                raise
            continue  # `auto` passes over what this base or target can't carry
        _require_measurable(request, candidate)
        _require_room(candidate, job, destination.path)
        with ArtifactWriter(destination.path, _identity(candidate, job)) as writer:
            outcome = bench.run(candidate, writer.root, writer.journal)
            if not outcome.failures or (is_last and gate is AUTO_GATE):
                golden = bench.write_golden(outcome, writer.root)
                return writer.publish(_manifest(writer, job, destination.name, outcome, tuple(failed), golden))
            failed.append(outcome.trial(" ".join(outcome.failures)))
    raise QualityGateFailed(_refusal(failed))


def _require_room(candidate: Candidate, job: Job, destination: Path) -> None:
    """What an interrupted conversion left is used or removed: either way it needs no room of its own."""
    planned = candidate.plan.weight_bytes if candidate.plan else 0
    left = size_bytes(partial(destination))
    require_room(max(planned + 2 * job.checkpoint.weight_bytes - left, 0), destination)


def _identity(candidate: Candidate, job: Job) -> str:
    """Of everything the written weights depend on. What only the manifest tells is made anew by every run."""
    base, checkpoint, plan, request = job.base, job.checkpoint, candidate.plan, job.request
    inputs = (base.root / CONFIG, *base.tensors.files, checkpoint.root / ADAPTER_CONFIG, *checkpoint.tensors.files)
    files = (*inputs, *plan.files) if plan else inputs
    made = (plan.form, plan.steps) if plan else ()
    corrected = (job.rank, request.steps, request.method, job.calibration)
    return identity(candidate.way, made, checkpoint.pairs, corrected, request.shard_bytes, versions(), files=files)


def gate_of(request: Request, ways: int) -> Gate:
    """The user's limits; for a form that is found by measuring, those of `auto` where the user sets none."""
    if ways == 1 or request.gate.is_set:
        return request.gate
    return AUTO_GATE


def _refusal(failed: list[Trial]) -> str:
    if len(failed) == 1:
        told = failed[0].verdict
    else:
        told = "No form passes:" + "".join(f"\n  - {it.route}, {it.quantization}: {it.verdict}" for it in failed) + "\n"
    return f"{told} Nothing was published. Take a way that loses less (`compare` measures them), or allow more."


def _require_measurable(request: Request, candidate: Candidate) -> None:
    """A limit that can't be checked must not look as if it had been."""
    choice = candidate.choice
    if not request.gate.is_set or choice.way.is_exact or (choice.measured and request.measure):
        return
    raise QualityGateFailed(
        "A limit needs a measurement, and there is none: "
        + ("leave out --no-measure." if choice.measured else "give the full-precision base.")
    )


def _manifest(
    writer: ArtifactWriter, job: Job, name: str, outcome: Outcome, failed: tuple[Trial, ...], golden: str | None
) -> Manifest:
    choice, checkpoint, base = outcome.candidate.choice, job.checkpoint, job.base
    adapter = writer.root / ADAPTER_DIR
    return Manifest(
        schema="graft.artifact/1",
        name=name,
        route=Route(
            name=choice.way.route,
            requested=job.request.wish.route,
            merged_onto=choice.form.merged_onto if choice.form else None,
            reason=_reason(outcome, job, failed),
        ),
        origin=origin_of(job),
        base=base_of(checkpoint, base, outcome.made.base_files),
        model=_model(writer, outcome, job),
        adapter=_adapter(writer) if adapter.is_dir() else None,
        checkpoint=file_digests(writer.root / CHECKPOINT_DIR) or None,
        quality=outcome.quality,
        trials=failed,
        recovery=outcome.made.recovery,
        golden=golden,
        versions=versions(),
    )


def _reason(outcome: Outcome, job: Job, failed: tuple[Trial, ...]) -> str:
    """Why this way, why not others, and what of the checkpoint is not served."""
    parts = [outcome.candidate.choice.reason]
    if failed:
        parts.append(
            "Tried before, and lost too much: "
            + ", ".join(f"{it.quantization} (KL {it.quality.kl_mean:.2g})" for it in failed if it.quality)
            + "."
        )
    # A shared base is served with its own tokenizer and chat template.
    differing = differing_files(job.checkpoint, job.base) if outcome.candidate.plan is None else ()
    if differing:
        parts.append(f"Served with the base's {', '.join(differing)}, which the checkpoint has in another form.")
    return " ".join(parts)


def origin_of(job: Job) -> Origin:
    """The checkpoint that went in, for the manifest."""
    return Origin(
        layout=job.checkpoint.layout,
        training=job.found.training.value,
        evidence=job.found.lines,
        digest=job.checkpoint.digest,
    )


def base_of(checkpoint: Checkpoint, base: BaseModel, digests: Mapping[str, str]) -> Base:
    """The base that went in, for the manifest. `digests`: of its weight files, where they are known already."""
    known = base.artifact.manifest.model.files if base.artifact else digests
    files = (base.root / CONFIG, *base.tensors.files)
    revision = checkpoint.config.get("revision")
    return Base(
        source=base.source(checkpoint.base_name),
        revision=revision if isinstance(revision, str) else None,
        files={path.name: known.get(path.name) or file_sha256(path) for path in files},
    )


def _model(writer: ArtifactWriter, outcome: Outcome, job: Job) -> Model:
    written = writer.root / MODEL_DIR
    if not written.is_dir():
        assert job.base.artifact, "only an artifact's model is referenced"
        return job.base.artifact.manifest.model.model_copy(update={"path": None})
    files = writer.digests(MODEL_DIR)
    return Model(
        path="model",
        fingerprint=digest(files),
        files=files,
        source=job.base.source(job.checkpoint.base_name),
        quantization=outcome.quantization,
        quantizer=outcome.made.quantizer,
        size_bytes=size_bytes(written),
    )


def _adapter(writer: ArtifactWriter) -> Adapter:
    directory = writer.root / ADAPTER_DIR
    files = writer.digests(ADAPTER_DIR)
    return Adapter(
        revision=digest(files),
        files=files,
        rank=max(Checkpoint.open(directory).ranks),
        size_bytes=size_bytes(directory),
    )


def versions() -> dict[str, str]:
    """Of the libraries that make an artifact."""
    found = {}
    for library in _LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:  # graft itself, when it runs from its source tree
            found[library] = "source"
    return found
