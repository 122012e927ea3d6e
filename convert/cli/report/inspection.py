"""The screen and the document of an inspection."""

from __future__ import annotations

from typing import Any

from rich.console import RenderableType
from rich.filesize import decimal
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from convert.cli.report.screen import Page, facts_table, training_words
from convert.detection.training import Training
from convert.errors import one_for_each_cause
from convert.pipeline.inspect import Inspection, Offer
from convert.routes.choose import REFUSED_MERGE


def inspection_screen(inspection: Inspection) -> Page:
    """What a checkpoint is, and a table of the ways to serve it."""
    parts: list[RenderableType] = [_facts(inspection)]
    if inspection.problems:
        parts.append(Text("\nIt can't be converted:", style="bold red"))
        parts += [Text(f"  - {problem}") for problem in one_for_each_cause(inspection.problems)]
        return tuple(parts)
    parts += [Text(), _ways(inspection.offers), Text()]
    parts += [Text(f"{number}  {offer.command}") for number, offer in enumerate(inspection.offers, 1)]
    if inspection.detection.training is Training.QLORA:
        parts.append(Text(f"\nNot offered: a merge back into the same 4 bits. {REFUSED_MERGE}"))
    obstacles = {offer.obstacle: None for offer in inspection.offers if offer.obstacle}
    parts += [Text(f"\n{obstacle}", style="yellow") for obstacle in obstacles]
    return tuple(parts)


def inspection_document(inspection: Inspection) -> dict[str, Any]:
    """The inspection as JSON, for programs."""
    checkpoint = inspection.checkpoint
    return {
        "checkpoint": str(checkpoint.root),
        "layout": checkpoint.layout,
        "training": inspection.detection.training.value,
        "evidence": list(inspection.detection.sources),
        "base": inspection.base_name,
        "ranks": list(checkpoint.ranks),
        "alphas": list(checkpoint.alphas),
        "targets": list(checkpoint.targets),
        "modules": len(checkpoint.lora_weights),
        "adapter_bytes": checkpoint.weight_bytes,
        "beside": checkpoint.trained_besides_lora,
        "notes": list(checkpoint.warnings),
        "problems": list(inspection.problems),
        "ways": [_offer_document(offer) for offer in inspection.offers],
    }


def _facts(inspection: Inspection) -> RenderableType:
    checkpoint = inspection.checkpoint
    table = facts_table()
    table.add_row("checkpoint", escape(str(checkpoint.root)))
    table.add_row("training", training_words(inspection.detection.training, inspection.detection.confidence))
    table.add_row("evidence", escape("\n".join(inspection.detection.sources)))
    table.add_row("layout", checkpoint.layout)
    table.add_row("base", escape(inspection.base_name))
    table.add_row("rank, alpha", f"{_numbers(checkpoint.ranks)}, {_numbers(checkpoint.alphas)}")
    table.add_row("targets", escape(f"{', '.join(checkpoint.targets)} ({len(checkpoint.lora_weights)} modules)"))
    if checkpoint.trained_besides_lora:
        table.add_row("beside LoRA", checkpoint.trained_besides_lora)
    table.add_row("size", decimal(checkpoint.weight_bytes))
    for warning in checkpoint.warnings:
        table.add_row("note", escape(warning))
    return table


def _numbers(values: tuple[float, ...]) -> str:
    return " / ".join(f"{value:g}" for value in values) or "none"


def _ways(offers: tuple[Offer, ...]) -> RenderableType:
    table = Table(title="Ways to serve it", title_justify="left", title_style="bold", expand=False)
    for heading in ("", "route", "stored", "size", "loss", "serving"):
        table.add_column(heading, no_wrap=heading not in ("loss", "serving"))
    for number, offer in enumerate(offers, 1):
        variant = offer.variant
        route = f"{variant.route}\n(default)" if offer.default else variant.route
        table.add_row(
            str(number),
            route,
            variant.storage_name,
            _offer_size(offer),
            variant.loss,
            variant.serving,
            end_section=True,
        )
    return Padding(table, 0)


def _offer_size(offer: Offer) -> str:
    if offer.obstacle:
        return "not possible"
    return "needs --base" if offer.output_bytes is None else decimal(offer.output_bytes)


def _offer_document(offer: Offer) -> dict[str, Any]:
    return {
        "route": offer.variant.route,
        "stored": offer.variant.storage_name,
        "training": offer.variant.training.value,
        "default": offer.default,
        "output_bytes": offer.output_bytes,
        "loss": offer.variant.loss,
        "serving": offer.variant.serving,
        "command": offer.command,
        "obstacle": offer.obstacle,
    }
