"""The screen and the document of a dry run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import RenderableType
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from convert.cli.report.screen import Page, facts_table, training_words
from convert.pipeline.dry_run import DryRun, PlannedVariant
from convert.pipeline.request import PreparedRequest
from convert.plan.conversion_plan import CastStep, CopyStep, LinearStep, ModelPlan, Step, UpdateStep
from convert.plan.phases import Estimate
from convert.safetensors_io.tensors import TensorSpec

_LAYER = re.compile(r"(?P<path>.+?\.)\d+\.(?P<name>.+)")
# The word for each kind of step in the table and in the JSON document.
_ORIGINS: dict[type[Step], str] = {CopyStep: "copied", CastStep: "cast", LinearStep: "made", UpdateStep: "edited"}


def plan_screen(dry_run: DryRun) -> Page:
    """The variants that would be tried, and every kind of tensor of the first."""
    parts: list[RenderableType] = [_facts(dry_run.prepared), Text(), *_variants(dry_run.variants)]
    first = next((plan for planned in dry_run.variants if planned.candidate and (plan := planned.candidate.plan)), None)
    if first:
        parts += [Text(), _tensors(first), *(Text(f"\nNote: {note}") for note in first.notes)]
    parts.append(
        Text(
            "\nNothing was written. In brackets: the disk that is used meanwhile. Memory and time are estimates. "
            "--json lists every phase and every tensor."
        )
    )
    return tuple(parts)


def _facts(prepared: PreparedRequest) -> Table:
    facts = facts_table()
    facts.add_row("checkpoint", escape(str(prepared.checkpoint.root)))
    facts.add_row("training", training_words(prepared.detection.training, prepared.detection.confidence))
    facts.add_row("evidence", escape("\n".join(prepared.detection.sources)))
    facts.add_row("base", escape(f"{prepared.base.root} ({prepared.base.quantization_name})"))
    facts.add_row("target", escape(prepared.target))
    for warning in prepared.checkpoint.warnings:
        facts.add_row("note", escape(warning))
    return facts


def _variants(variants: Sequence[PlannedVariant]) -> list[RenderableType]:
    """A table of what each variant takes; below it the options that ask for each, and why some are not possible."""
    table = Table(title="Tried in this order", title_justify="left", title_style="bold")
    for heading in ("", "way", "output", "memory", "time", "loss"):
        table.add_column(heading, no_wrap=heading not in ("way", "loss"))
    options: list[Text] = []
    obstacles: list[Text] = []
    for number, planned in enumerate(variants, 1):
        variant = planned.variant
        table.add_row(str(number), _way(planned), *_costs(planned), variant.loss)
        options.append(Text(f"{number}  {variant.flags}"))
        obstacles += [Text(f"\n{number}: {shortage}", style="yellow") for shortage in planned.shortages]
        if planned.obstacle:
            obstacles.append(Text(f"\n{number} is not possible: {planned.obstacle}", style="yellow"))
    return [table, Text("\nOptions of `run` that ask for each:"), *options, *obstacles]


def _way(planned: PlannedVariant) -> str:
    rank = planned.candidate.rank if planned.candidate else None
    return f"{planned.variant.route}, {planned.variant.storage_name}" + (f", rank {rank}" if rank else "")


def _costs(planned: PlannedVariant) -> tuple[str, str, str]:
    """Size of the output, below it the disk at the peak; memory at the peak; time."""
    if planned.candidate is None or planned.estimate is None:
        return "not possible", "", ""
    costs = planned.estimate
    return (
        f"{decimal(costs.output_bytes)}\n({decimal(costs.disk_bytes)})",
        decimal(costs.memory_bytes),
        f"{sum(costs.seconds):.0f} s",
    )


@dataclass(frozen=True)
class _Row:
    """The tensors of one name, in every layer or at one place. `weights`: the weights of which they are the parts."""

    weights: int
    specs: tuple[TensorSpec, ...]

    def cells(self) -> tuple[str, ...]:
        parts = len(self.specs) // self.weights
        count = str(self.weights) if parts == 1 else f"{self.weights} x {parts}"
        return self.specs[0].dtype, count, decimal(sum(spec.nbytes for spec in self.specs))


def _tensors(plan: ModelPlan) -> RenderableType:
    """A table with one line for the weights that have the same name in every layer, below the path of the layers."""
    places: dict[str, dict[tuple[str, str], _Row]] = {"": {}}
    for step in plan.steps:
        layer = _LAYER.match(step.outputs[0].name)
        place, name = (f"{layer['path']}*", layer["name"]) if layer else ("", step.outputs[0].name)
        rows, key = places.setdefault(place, {}), (name, _ORIGINS[type(step)])
        known = rows.get(key, _Row(0, ()))
        rows[key] = _Row(known.weights + 1, known.specs + step.outputs)
    table = Table(title="Weights of the first", title_justify="left", title_style="bold")
    table.add_column("name", overflow="fold")
    for heading in ("how", "stored as", "tensors", "bytes"):
        table.add_column(heading, no_wrap=True, justify="left" if heading in ("how", "stored as") else "right")
    for place, rows in places.items():
        if place and rows:
            table.add_section()
            table.add_row(f"{place}, in each layer:", style="bold")
        for (name, how), row in rows.items():
            table.add_row(f"  {name}" if place else name, how, *row.cells())
    return table


def plan_document(dry_run: DryRun) -> dict[str, Any]:
    """The dry run as JSON, for programs, with every tensor."""
    return {
        "checkpoint": str(dry_run.prepared.checkpoint.root),
        "training": dry_run.prepared.detection.training.value,
        "evidence": list(dry_run.prepared.detection.sources),
        "confidence": dry_run.prepared.detection.confidence,
        "target": dry_run.prepared.target,
        "notes": list(dry_run.prepared.checkpoint.warnings),
        "ways": [_planned_document(planned) for planned in dry_run.variants],
    }


def _planned_document(planned: PlannedVariant) -> dict[str, Any]:
    model = planned.candidate.plan if planned.candidate else None
    tensors = [
        {"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape), "how": _ORIGINS[type(step)]}
        for step in (model.steps if model else ())
        for spec in step.outputs
    ]
    return {
        "flags": planned.variant.flags,
        "obstacle": planned.obstacle,
        "reason": planned.candidate.choice.reason if planned.candidate else None,
        "rank": planned.candidate.rank if planned.candidate else None,
        "estimate": _estimate_document(planned.estimate) if planned.estimate else None,
        "shortages": list(planned.shortages),
        "files": list(model.stop_tokens.files) if model else [],
        "notes": list(model.notes) if model else [],
        "tensors": tensors,
    }


def _estimate_document(estimate: Estimate) -> dict[str, Any]:
    phases = [
        {
            "name": phase.name,
            "memory_bytes": phase.memory_bytes,
            "disk_bytes": phase.disk_bytes,
            "temporary_bytes": phase.temporary_bytes,
            "seconds": seconds,
        }
        for phase, seconds in zip(estimate.phases, estimate.seconds, strict=True)
    ]
    return {
        "output_bytes": estimate.output_bytes,
        "memory_bytes": estimate.memory_bytes,
        "disk_bytes": estimate.disk_bytes,
        "temporary_bytes": estimate.temporary_bytes,
        "seconds": sum(estimate.seconds),
        "phases": phases,
    }
