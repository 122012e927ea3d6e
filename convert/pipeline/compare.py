"""`compare`: builds and measures the variants of one checkpoint, and keeps only the page that compares them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from convert.artifact import ADAPTER_DIR, MODEL_DIR
from convert.artifact.scratch import scratch_directory
from convert.detection.training import Training
from convert.errors import ConvertError, OutputUnwritable, RouteRefused
from convert.pipeline.comparison import Comparison, Row, comparison_document, comparison_page
from convert.pipeline.estimate import Estimator
from convert.pipeline.evaluate import Evaluation, Evaluator
from convert.pipeline.manifest import base_of, origin_of, versions
from convert.pipeline.request import PreparedRequest, Request, prepare
from convert.plan.machine import require_resources
from convert.progress import Progress
from convert.quality import choosing_gate
from convert.routes.variants import VARIANTS, RouteVariant, offered_variants
from convert.verification.engine import EngineOptions
from convert.verification.speed import measure_speed
from convert.write.files import write_json
from convert.write.publisher import require_absent

PAGE, DOCUMENT = "comparison.html", "comparison.json"
_SPEED_TOKENS = 32


@dataclass(frozen=True)
class ComparisonRun:
    """The comparison, and for each variant that is not possible a sentence with the reason."""

    comparison: Comparison
    obstacles: tuple[str, ...]


def compare(request: Request, names: Sequence[str] | None, *, speed: bool, progress: Progress) -> ComparisonRun:
    """Build and measure every variant that this checkpoint, base and target can carry.

    `names`: the variants, as `variant_named` reads them; None for all that are offered. `speed`: also serve each one
    with vLLM and measure how fast it decodes. Raises ConvertError for wrong input, and where no variant is possible.
    """
    prepared = prepare(request, progress)
    training = prepared.detection.training
    variants = [variant_named(name, training) for name in names] if names else list(offered_variants(training))
    _require_distinct(variants)
    estimator, evaluator = Estimator.of(prepared), Evaluator(prepared, choosing_gate(request.gate), progress)
    rows, obstacles = [], []
    errors: list[ConvertError] = []
    for number, variant in enumerate(variants):
        progress("variants compared", number, len(variants))
        try:
            rows.append(_measured_row(estimator, variant, evaluator, speed=speed, progress=progress))
        except ConvertError as error:
            errors.append(error)
            obstacles.append(f"{variant.flags}: {error}")
    if not rows:
        raise errors[-1]  # there is at least one variant of each training
    comparison = Comparison(
        name=prepared.checkpoint.root.name,
        origin=origin_of(prepared),
        base=base_of(prepared.checkpoint, prepared.base, {}),
        rows=_with_choice(rows),
        answers=evaluator.answers,
        versions=versions(),
    )
    return ComparisonRun(comparison, tuple(obstacles))


def variant_named(name: str, training: Training) -> RouteVariant:
    """The variant `ROUTE:STORED` or `ROUTE:STORED:WEIGHTS`, such as merge:nf4:original. Raises RouteRefused."""
    trained_on = "dequantized" if training is Training.QLORA else "original"
    by_full_name = {_full_name(variant): variant for variant in VARIANTS if variant.training is training}
    by_short_name = {full.removesuffix(f":{trained_on}"): variant for full, variant in by_full_name.items()}
    if variant := by_full_name.get(name) or by_short_name.get(name):
        return variant
    known = ", ".join(sorted(by_short_name))
    raise RouteRefused(f"{name!r} is not a route variant of a {training.value}. Choose one of: {known}.")


def _require_distinct(variants: Sequence[RouteVariant]) -> None:
    """Raises RouteRefused where a variant is named twice, also where its two names differ."""
    twice = [variant for number, variant in enumerate(variants) if variant in variants[:number]]
    if twice:
        raise RouteRefused(f"{_full_name(twice[0])} is given twice with --way. Give each way once.")


def write_report(run: ComparisonRun, directory: Path) -> None:
    """Write the page and the document into a new directory. Raises OutputExists, OutputUnwritable."""
    require_absent(directory)
    try:
        directory.mkdir(parents=True)
        (directory / PAGE).write_text(comparison_page(run.comparison), encoding="utf-8")
        document = comparison_document(run.comparison) | {"obstacles": list(run.obstacles)}
        write_json(directory / DOCUMENT, document)
    except OSError as error:
        raise OutputUnwritable(f"{directory} can't be written: {error.strerror}.") from error


def _full_name(variant: RouteVariant) -> str:
    return f"{variant.route}:{variant.storage}" + (f":{variant.onto}" if variant.onto else "")


def _measured_row(
    estimator: Estimator, variant: RouteVariant, evaluator: Evaluator, *, speed: bool, progress: Progress
) -> Row:
    """Build and measure one variant in a directory that is removed afterwards. Raises ConvertError."""
    prepared = estimator.prepared
    candidate = prepared.candidate(variant)
    with scratch_directory() as root:
        require_resources(estimator.estimate(candidate), root / "way")
        evaluation = evaluator.evaluate(candidate, root)
        tokens_per_s = _decode_speed(prepared, root, progress) if speed else None
        shutil.rmtree(root / MODEL_DIR, ignore_errors=True)
    return _row(prepared, evaluation, tokens_per_s)


def _row(prepared: PreparedRequest, evaluation: Evaluation, tokens_per_s: float | None) -> Row:
    variant = evaluation.candidate.variant
    assert evaluation.quality, "every variant of a comparison is measured"
    assert evaluation.examination, "every variant of a comparison is measured"
    onto = " onto the original weights" if variant.onto == "original" and prepared.quantizer else ""
    return Row(
        label=f"{variant.route}{onto}, {variant.storage_name}",
        command=f"{prepared.request.command()} {variant.flags}",
        route=variant.route,
        quantization=evaluation.quantization,
        size_bytes=evaluation.size_bytes,
        quality=evaluation.quality,
        failures=evaluation.failures,
        decode_tokens_per_s=tokens_per_s,
        recovery=evaluation.build.recovery,
        retained=evaluation.retained,
        answers=evaluation.examination.answers,
    )


def _with_choice(rows: Sequence[Row]) -> tuple[Row, ...]:
    """Mark the row to choose: the smallest that keeps its limits; of rows of equal size that with the least loss."""
    passing = [row for row in rows if row.passes]
    chosen = min(passing, key=lambda row: (row.size_bytes, row.quality.kl_mean), default=None)
    return tuple(replace(row, chosen=row is chosen) for row in rows)


def _decode_speed(prepared: PreparedRequest, root: Path, progress: Progress) -> float:
    """Tokens per second of one stream."""
    adapter = root / ADAPTER_DIR
    model = root / MODEL_DIR
    speeds = measure_speed(
        model if model.is_dir() else prepared.base.root,
        adapter if adapter.is_dir() else None,
        rank=prepared.rank if adapter.is_dir() else 0,
        streams=(1,),
        tokens=_SPEED_TOKENS,
        options=EngineOptions(),
        progress=progress,
    )
    return speeds[0].tokens_per_s
