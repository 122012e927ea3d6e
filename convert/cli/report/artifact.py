"""What was made, why that way, what it lost, and what to do next."""

from __future__ import annotations

from typing import Any

from rich.markup import escape
from rich.text import Text

from convert.artifact import Artifact, Manifest
from convert.report.page import Page, facts_table
from convert.units import readable_bytes

# Mean KL in nats per token from which answers to the same question visibly differ in the models measured so far.
_MUCH = 0.1
_ADVICE = (
    "that is a visible difference on this text. Measure on text like your own with --text; "
    "--quantize none loses next to nothing, at the size of the 16-bit model"
)


def artifact_page(artifact: Artifact) -> Page:
    """What was made, why that way, what it lost, and what to do next."""
    manifest = artifact.manifest
    table = facts_table()
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


def _storage(artifact: Artifact) -> str:
    model = artifact.manifest.model
    stored = "16-bit" if model.quantization == "none" else model.quantization
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
