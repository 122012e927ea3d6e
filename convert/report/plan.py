"""What `run` would write, and what it would take."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import Any

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from convert.plan import ModelPlan
from convert.planning import Plan, Planned
from convert.report.page import TRAINING, Page, facts_table
from convert.tensors import TensorSpec
from convert.units import readable_bytes


def plan_page(plan: Plan) -> Page:
    """The ways that would be tried, and every kind of tensor of the first."""
    job = plan.job
    facts = facts_table()
    facts.add_row("checkpoint", escape(str(job.checkpoint.root)))
    facts.add_row("training", TRAINING[job.found.training])
    facts.add_row("evidence", escape("\n".join(job.found.lines)))
    facts.add_row("base", escape(f"{job.base.root} ({job.base.quantization})"))
    facts.add_row("target", job.target)
    table = Table(title="Tried in this order", title_justify="left", title_style="bold")
    for heading in ("way", "output", "memory", "time", "loss"):
        table.add_column(heading)
    for way in plan.ways:
        table.add_row(way.flags, *_costs(way))
    parts: list[RenderableType] = [facts, Text(), table]
    first = next((way.candidate.plan for way in plan.ways if way.candidate and way.candidate.plan), None)
    if first:
        parts += [Text(), _tensors(first)]
    parts.append(Text("\nNothing was written. Memory and time in brackets: for measuring. --json lists every tensor."))
    return tuple(parts)


def _costs(way: Planned) -> tuple[str, str, str, str]:
    if way.candidate is None or way.estimate is None:
        return "not possible", "", "", way.obstacle or ""
    costs = way.estimate
    return (
        readable_bytes(costs.output_bytes),
        f"{readable_bytes(costs.writing_memory_bytes)} ({readable_bytes(costs.measuring_memory_bytes)})",
        f"{costs.writing_s:.0f} s ({costs.measuring_s:.0f} s)",
        way.candidate.way.loss,
    )


def _tensors(plan: ModelPlan) -> RenderableType:
    """Weights of the same name in every layer on one line."""
    groups: dict[tuple[str, str], list[tuple[TensorSpec, ...]]] = {}
    for step in plan.steps:
        name = re.sub(r"\.\d+\.", ".*.", step.outputs[0].name)
        groups.setdefault((name, type(step).__name__.lower()), []).append(step.outputs)
    table = Table(title="Weights of the first", title_justify="left", title_style="bold")
    for heading in ("name", "how", "stored as", "weights", "tensors", "bytes"):
        table.add_column(heading, no_wrap=heading == "name")
    for (name, how), outputs in groups.items():
        specs = [spec for group in outputs for spec in group]
        size = readable_bytes(sum(spec.nbytes for spec in specs))
        table.add_row(name, how, outputs[0][0].dtype, str(len(outputs)), str(len(specs)), size)
    return table


def plan_document(plan: Plan) -> dict[str, Any]:
    """The same for programs, with every tensor."""
    return {
        "checkpoint": str(plan.job.checkpoint.root),
        "training": plan.job.found.training.value,
        "evidence": list(plan.job.found.lines),
        "target": plan.job.target,
        "ways": [_planned_document(way) for way in plan.ways],
    }


def _planned_document(way: Planned) -> dict[str, Any]:
    model = way.candidate.plan if way.candidate else None
    tensors = [
        {"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape), "how": type(step).__name__.lower()}
        for step in (model.steps if model else ())
        for spec in step.outputs
    ]
    return {
        "flags": way.flags,
        "obstacle": way.obstacle,
        "reason": way.candidate.choice.reason if way.candidate else None,
        "estimate": asdict(way.estimate) if way.estimate else None,
        "files": [path.name for path in model.files] if model else [],
        "tensors": tensors,
    }
