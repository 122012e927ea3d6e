"""What a checkpoint is, and a table of the ways to serve it."""

from __future__ import annotations

from typing import Any

from rich.console import RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from convert.detect import Training
from convert.inspection import Inspection, Offer
from convert.report.page import TRAINING, Page, facts_table
from convert.routes.choose import REFUSED_MERGE
from convert.units import readable_bytes


def inspection_page(inspection: Inspection) -> Page:
    """What a checkpoint is, and a table of the ways to serve it."""
    parts: list[RenderableType] = [_facts(inspection)]
    if inspection.problems:
        parts.append(Text("\nIt can't be converted:", style="bold red"))
        parts += [Text(f"  - {problem}") for problem in inspection.problems]
        return tuple(parts)
    parts += [Text(), _ways(inspection.offers), Text()]
    parts += [Text(f"{number}  {offer.command}") for number, offer in enumerate(inspection.offers, 1)]
    if inspection.detection.training is Training.QLORA:
        parts.append(Text(f"\nNot offered: a merge back into the same 4 bits. {REFUSED_MERGE}"))
    obstacles = {offer.obstacle: None for offer in inspection.offers if offer.obstacle}
    parts += [Text(f"\n{obstacle}", style="yellow") for obstacle in obstacles]
    return tuple(parts)


def inspection_document(inspection: Inspection) -> dict[str, Any]:
    """The same for programs."""
    checkpoint = inspection.checkpoint
    return {
        "checkpoint": str(checkpoint.root),
        "layout": checkpoint.layout,
        "training": inspection.detection.training.value,
        "evidence": list(inspection.detection.lines),
        "base": inspection.base_name,
        "ranks": list(checkpoint.ranks),
        "alphas": list(checkpoint.alphas),
        "targets": list(checkpoint.targets),
        "modules": len(checkpoint.pairs),
        "adapter_bytes": checkpoint.weight_bytes,
        "beside": checkpoint.beside,
        "notes": list(checkpoint.notes),
        "problems": list(inspection.problems),
        "ways": [_offer_document(offer) for offer in inspection.offers],
    }


def _facts(inspection: Inspection) -> RenderableType:
    checkpoint = inspection.checkpoint
    table = facts_table()
    table.add_row("checkpoint", escape(str(checkpoint.root)))
    table.add_row("training", TRAINING[inspection.detection.training])
    table.add_row("evidence", escape("\n".join(inspection.detection.lines)))
    table.add_row("layout", checkpoint.layout)
    table.add_row("base", escape(inspection.base_name))
    table.add_row("rank, alpha", f"{_numbers(checkpoint.ranks)}, {_numbers(checkpoint.alphas)}")
    table.add_row("targets", escape(f"{', '.join(checkpoint.targets)} ({len(checkpoint.pairs)} modules)"))
    if checkpoint.beside:
        table.add_row("beside LoRA", checkpoint.beside)
    table.add_row("size", readable_bytes(checkpoint.weight_bytes))
    for note in checkpoint.notes:
        table.add_row("note", escape(note))
    return table


def _numbers(values: tuple[float, ...]) -> str:
    return " / ".join(f"{value:g}" for value in values) or "none"


def _ways(offers: tuple[Offer, ...]) -> RenderableType:
    table = Table(title="Ways to serve it", title_justify="left", title_style="bold", expand=False)
    for heading in ("", "route", "stored", "size", "loss", "serving"):
        table.add_column(heading, no_wrap=heading in ("", "route", "size"))
    for number, offer in enumerate(offers, 1):
        way = offer.way
        route = f"{way.route}\n(default)" if offer.default else way.route
        table.add_row(str(number), route, way.stored, _offer_size(offer), way.loss, way.serving, end_section=True)
    return Padding(table, 0)


def _offer_size(offer: Offer) -> str:
    if offer.obstacle:
        return "not possible"
    return "needs --base" if offer.output_bytes is None else readable_bytes(offer.output_bytes)


def _offer_document(offer: Offer) -> dict[str, Any]:
    return {
        "route": offer.way.route,
        "stored": offer.way.stored,
        "training": offer.way.training.value,
        "default": offer.default,
        "output_bytes": offer.output_bytes,
        "loss": offer.way.loss,
        "serving": offer.way.serving,
        "command": offer.command,
        "obstacle": offer.obstacle,
    }
