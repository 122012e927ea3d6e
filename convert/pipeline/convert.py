"""`run`: converts a checkpoint and its base to a published artifact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from convert.artifact import Artifact, Trial, size_bytes
from convert.artifact.file_names import ADAPTER_CONFIG, CONFIG
from convert.errors import ConvertError, QualityGateFailed
from convert.pipeline.estimate import Estimator
from convert.pipeline.evaluate import Evaluator
from convert.pipeline.manifest import ManifestBuilder, versions
from convert.pipeline.request import Candidate, PreparedRequest, Request, prepare
from convert.plan.machine import require_resources
from convert.plan.phases import Estimate
from convert.progress import Progress, silent
from convert.quality import choosing_gate, require_passed
from convert.routes.variants import RouteVariant
from convert.write.journal import conversion_id
from convert.write.publisher import ArtifactWriter, finished_before, partial_directory, require_absent


@dataclass(frozen=True)
class Destination:
    """Where the artifact appears, and the name under which it is served.

    `keep_finished`: one that the same conversion has made there before, with this option, is kept and returned.
    """

    path: Path
    name: str
    keep_finished: bool = False


def convert(request: Request, destination: Destination, progress: Progress = silent) -> Artifact:
    """Check everything, write, measure, and publish by one rename. Raises ConvertError, and then leaves no files.

    After kill -9, a crash or SIGTERM the same request goes on where the last run stopped (`ArtifactWriter`). Where the
    options leave the storage open, variants are built and measured, smallest first, until one keeps its limits.
    """
    if not destination.keep_finished:
        require_absent(destination.path)
    prepared = prepare(request, progress)
    variants = prepared.open_variants()
    candidates = _candidates(prepared, variants)
    if destination.keep_finished and (artifact := _finished_before(destination, candidates, prepared)):
        return artifact
    gate = choosing_gate(request.gate) if len(variants) > 1 else request.gate
    estimator, evaluator = Estimator.of(prepared), Evaluator(prepared, gate, progress)
    trials: list[Trial] = []
    for number, candidate in enumerate(candidates, start=1):
        _require_measurable(request, candidate)
        _require_resources(estimator.estimate(candidate), destination.path)
        identity = _conversion_id(candidate, prepared)
        with ArtifactWriter(destination.path, identity, record=destination.keep_finished) as writer:
            evaluation = evaluator.evaluate(candidate, writer.root, writer.journal)
            require_passed(evaluator.answers)
            if not evaluation.failures or (number == len(candidates) and gate.is_default):
                golden = evaluator.write_golden(evaluation, writer.root)
                manifest = ManifestBuilder(prepared, destination.name, evaluation, trials, golden)
                return writer.publish(manifest.build(writer))
        trials.append(evaluation.trial())
    raise QualityGateFailed(_refusal(trials))


def _candidates(prepared: PreparedRequest, variants: Sequence[RouteVariant]) -> list[Candidate]:
    """The variants that this checkpoint, base and target can carry; only the last of them where nothing is measured.

    The last one loses least. Raises ConvertError where there is none.
    """
    candidates: list[Candidate] = []
    obstacles: list[ConvertError] = []
    for variant in variants:
        try:
            candidates.append(prepared.candidate(variant))
        except ConvertError as error:
            obstacles.append(error)
    if not candidates:
        raise obstacles[-1]
    return candidates if prepared.request.measure else candidates[-1:]


def _require_measurable(request: Request, candidate: Candidate) -> None:
    """Raises QualityGateFailed where a limit is set and nothing can be measured: it would look like a kept limit."""
    choice = candidate.choice
    if not request.gate.is_set or choice.variant.is_exact or (choice.is_measurable and request.measure):
        return
    raise QualityGateFailed(
        "A limit needs a measurement, and there is none: "
        + ("leave out --no-measure." if choice.is_measurable else "give the full-precision base.")
    )


def _require_resources(estimate: Estimate, destination: Path) -> None:
    """Raises MemoryShort or OutputUnwritable where a candidate does not fit, before it is built.

    Files of an interrupted run are used or removed, so they count as free room.
    """
    interrupted = size_bytes(partial_directory(destination))
    require_resources(estimate, destination, interrupted)


def _finished_before(
    destination: Destination, candidates: Sequence[Candidate], prepared: PreparedRequest
) -> Artifact | None:
    if not destination.path.is_dir():
        return None
    identities = {_conversion_id(candidate, prepared) for candidate in candidates}
    artifact = finished_before(destination.path, identities)
    return artifact if artifact and artifact.manifest.name == destination.name else None


def _conversion_id(candidate: Candidate, prepared: PreparedRequest) -> str:
    """The identity of everything that the written weights depend on. The manifest is written anew by every run."""
    base, checkpoint, plan, request = prepared.base, prepared.checkpoint, candidate.plan, prepared.request
    inputs = (base.root / CONFIG, *base.tensors.files, checkpoint.root / ADAPTER_CONFIG, *checkpoint.tensors.files)
    side_files = tuple(file for file in plan.files.values() if isinstance(file, Path)) if plan else ()
    output = (plan.output_format, plan.steps, plan.config) if plan else ()
    settings = (prepared.rank, request.steps, request.method, prepared.calibration)
    return conversion_id(
        candidate.variant,
        output,
        checkpoint.lora_weights,
        settings,
        request.shard_bytes,
        versions(),
        files=(*inputs, *side_files),
    )


def _refusal(trials: Sequence[Trial]) -> str:
    if len(trials) == 1:
        verdicts = f"{trials[0].verdict} "
    else:
        listed = "".join(f"\n  - {trial.route}, {trial.quantization}: {trial.verdict}" for trial in trials)
        verdicts = f"No candidate keeps its limits:{listed}\n"
    return f"{verdicts}Nothing was published. Choose a route that loses less (see `compare`), or relax the limits."
