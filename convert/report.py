"""What the commands show: pages for people, one JSON document for programs."""

from __future__ import annotations

from typing import Any

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from convert.artifact import Artifact, Manifest
from convert.detect import Training
from convert.inspection import Inspection, Offer
from convert.routes.choose import REFUSED_MERGE

Page = tuple[RenderableType, ...]

# Mean KL in nats per token from which answers to the same question visibly differ in the models measured so far.
_MUCH = 0.1
_ADVICE = (
    "that is a visible difference on this text. Measure on text like your own with --text; "
    "--quantize none loses next to nothing, at the size of the 16-bit model"
)

_TRAINING = {
    Training.LORA: "LoRA (trained on full-precision weights)",
    Training.QLORA: "QLoRA (trained on 4-bit weights)",
    Training.UNKNOWN: "unknown: LoRA or QLoRA",
}


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
        parts.append(Text(f"\nNot offered: a 4-bit merge. {REFUSED_MERGE}"))
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


def artifact_page(artifact: Artifact) -> Page:
    """What was made, why that way, what it lost, and what to do next."""
    manifest = artifact.manifest
    table = _table()
    table.add_row("artifact", escape(f"{artifact.root}  ({manifest.name})"))
    table.add_row("route", f"{manifest.route.name}, {_storage(artifact)}")
    table.add_row("why", manifest.route.reason)
    table.add_row("evidence", escape("\n".join(manifest.origin.evidence)))
    table.add_row("quality", _quality(manifest))
    if manifest.quality and manifest.quality.kl_mean > _MUCH:
        table.add_row("note", _ADVICE)
    table.add_row("size", _sizes(artifact))
    return table, Text(f"\nNext: python -m serve run {artifact.root}")


def artifact_document(artifact: Artifact) -> dict[str, Any]:
    return {"artifact": str(artifact.root), **artifact.manifest.model_dump(mode="json", by_alias=True)}


def print_page(page: Page) -> None:
    """Lines of text are never cut or broken: there are commands in them, to be copied."""
    console = Console(highlight=False)
    for part in page:
        console.print(part, soft_wrap=isinstance(part, Text))


def readable_bytes(count: int) -> str:
    """Decimal units, as disks are sold: 269.1 MB."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def _table() -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    return table


def _facts(inspection: Inspection) -> RenderableType:
    checkpoint = inspection.checkpoint
    table = _table()
    table.add_row("checkpoint", escape(str(checkpoint.root)))
    table.add_row("training", _TRAINING[inspection.detection.training])
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


def _storage(artifact: Artifact) -> str:
    model = artifact.manifest.model
    stored = "16-bit" if model.quantization == "none" else "NF4"
    return f"{stored} model" if model.path else f"{stored} base of another artifact ({model.fingerprint[:12]})"


def _quality(manifest: Manifest) -> str:
    quality = manifest.quality
    if quality is None:
        unquantized = manifest.model.quantization == "none"
        as_trained = manifest.adapter and (manifest.origin.training == "qlora" or unquantized)
        return "nothing lost: the same weights and the same adapter as in training" if as_trained else "not measured"
    return (
        f"KL {quality.kl_mean:.2g} nats per token (99th percentile {quality.kl_p99:.2g}), same best token at "
        f"{quality.top1_agreement:.1%} of {quality.tokens} positions; text: {quality.text}; "
        f"against {quality.reference}"
    )


def _sizes(artifact: Artifact) -> str:
    model, adapter = artifact.manifest.model, artifact.manifest.adapter
    parts = [f"model {readable_bytes(model.size_bytes)}" if model.path else "model shared"]
    if adapter:
        parts.append(f"adapter {readable_bytes(adapter.size_bytes)} (rank {adapter.rank})")
    return ", ".join(parts)
