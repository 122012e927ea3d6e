"""The screen and the document of an artifact."""

from __future__ import annotations

import shlex
from typing import Any

from rich.filesize import decimal
from rich.markup import escape
from rich.text import Text

from convert.artifact import Artifact, Manifest, Quality
from convert.cli.report.screen import Page, facts_table, training_words
from convert.detection.training import Training

# Mean KL in nats per token from which answers to the same question visibly differ in the models measured so far.
_VISIBLE_KL = 0.1
_ADVICE = (
    "that is a visible difference on this text. Measure on text like your own with --text; "
    "--quantize none loses next to nothing, at the size of the 16-bit model"
)


def artifact_screen(artifact: Artifact) -> Page:
    """The artifact, the reason for its route, its loss, and the next commands."""
    manifest = artifact.manifest
    table = facts_table()
    table.add_row("artifact", escape(f"{artifact.root}  ({manifest.name})"))
    table.add_row("route", f"{manifest.route.name}, {_storage(artifact)}")
    table.add_row("why", escape(manifest.route.reason))
    table.add_row("training", training_words(Training(manifest.origin.training), manifest.origin.confidence))
    table.add_row("evidence", escape("\n".join(manifest.origin.evidence)))
    table.add_row("quality", _quality(manifest))
    if manifest.quality and manifest.quality.kl_mean > _VISIBLE_KL:
        table.add_row("note", _ADVICE)
    for note in manifest.notes:
        table.add_row("note", escape(note))
    table.add_row("size", _sizes(artifact))
    command = shlex.join(["python", "-m", "serve", "run", str(artifact.root)])
    return table, Text(f"\nNext: {command}")


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
        f"{quality.top1_agreement:.1%} of {quality.tokens} positions{_kept(quality)}; text: {quality.text}; "
        f"against {quality.reference}"
    )


def _kept(quality: Quality) -> str:
    """What is left of the fine-tune, as far as it was measured."""
    parts = []
    if quality.distance_kept is not None:
        parts.append(
            f"{quality.distance_kept:.1%} of what training changed kept (base alone: KL {quality.kl_base:.2g})"
        )
    elif quality.kl_base is not None:
        parts.append("the text doesn't show what training changed")
    if quality.gain_kept is not None:
        parts.append(f"{quality.gain_kept:.1%} of the gain kept")
    if retention := quality.retention:
        parts.append(f"retention {retention.mean:.3f}, least {retention.least:.3f} ({retention.least_module})")
    return "".join(f"; {part}" for part in parts)


def _sizes(artifact: Artifact) -> str:
    model, adapter = artifact.manifest.model, artifact.manifest.adapter
    parts = [f"model {decimal(model.size_bytes)}" if model.path else "model shared"]
    if adapter:
        parts.append(f"adapter {decimal(adapter.size_bytes)} (rank {adapter.rank})")
    return ", ".join(parts)
