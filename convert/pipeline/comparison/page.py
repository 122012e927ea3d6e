"""A comparison for people: one HTML file with its pictures in it. Its text is in the template page.html.j2."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.filesize import decimal

from convert.artifact import Quality
from convert.pipeline.comparison import picture
from convert.pipeline.comparison.rows import Comparison, Row
from convert.quality import Answer

_DIRECTORY = Path(__file__).parent
_TEMPLATE, _STYLE = "page.html.j2", "page.css"


def comparison_page(comparison: Comparison) -> str:
    """The page as HTML. The same comparison gives the same page. Every value from outside is escaped."""
    environment = Environment(
        loader=FileSystemLoader(_DIRECTORY),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    rows = comparison.rows
    return environment.get_template(_TEMPLATE).render(
        title=f"{comparison.name}: ways to serve it",
        style=(_DIRECTORY / _STYLE).read_text(encoding="utf-8"),
        trade_off_picture=picture.trade_off(rows),
        layers_picture=_layers_picture(rows),
        rows=rows,
        chosen=comparison.chosen,
        quality=rows[0].quality,
        text_name=_text_name(rows[0].quality),
        recommendation=recommendation(comparison),
        columns=_COLUMNS,
        canaries=list(_canaries(comparison)),
        lineage=list(_lineage(comparison)),
        storage=_storage,
        number=_number,
    )


def recommendation(comparison: Comparison) -> str:
    """The variant to take, with its figures: one sentence of plain text."""
    row = comparison.chosen
    if row is None:
        return "None of these ways keeps its limits: nothing is recommended."
    kept = [decimal(row.size_bytes), _distance(row.quality)]
    if row.quality.gain_kept is not None:
        kept.append(f"{row.quality.gain_kept:.1%} of the fine-tune's gain kept")
    if canaries := row.quality.canaries:
        kept.append(f"{canaries.passed} of {canaries.asked} canaries answered")
    if row.decode_tokens_per_s:
        kept.append(f"{row.decode_tokens_per_s:.3g} tokens/s")
    return f"Take {row.label}: {', '.join(kept)}."


@dataclass(frozen=True)
class Figure:
    """One cell of the table.

    `text`: None where the figure is not known. `note`: a second line in small type. `bar`: a share as CSS writes it,
    drawn below the text.
    """

    text: str | None
    note: str = ""
    bar: str | None = None


@dataclass(frozen=True)
class Column:
    """One column of figures. `explanation` is shown when the pointer rests on the heading."""

    heading: str
    explanation: str
    figure: Callable[[Row], Figure]


@dataclass(frozen=True)
class CanaryAnswers:
    """One canary, and the labelled answers to its question: of the function as trained, then of every row."""

    question: str
    expected: str
    answers: tuple[tuple[str, Answer], ...]


def _kl(row: Row) -> Figure:
    mean = row.quality.kl_mean
    return Figure("0" if mean == 0 else f"{mean:.2g}", note=f"p99 {row.quality.kl_p99:.2g}")


def _change(row: Row) -> Figure:
    return _share(row.quality.distance_kept)


def _gain(row: Row) -> Figure:
    return _share(row.quality.gain_kept)


def _share(kept: float | None) -> Figure:
    return Figure(None) if kept is None else Figure(f"{kept:.1%}", bar=f"{min(1.0, kept):.1%}")


def _retention(row: Row) -> Figure:
    kept = row.quality.retention
    if kept is None:
        return Figure("1", note="by construction") if row.route == "adapter" else Figure(None)
    return Figure(f"{kept.mean:.3f}", note=f"least {kept.least:.3f}")


def _passed_canaries(row: Row) -> Figure:
    canaries = row.quality.canaries
    return Figure(f"{canaries.passed} of {canaries.asked}" if canaries else None)


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.3g}"


_COLUMNS = (
    Column("size", "Bytes of model and adapter", lambda row: Figure(decimal(row.size_bytes))),
    Column("KL", "Mean and 99th percentile, nats per token", _kl),
    Column("same token", "Positions with the same best token", lambda row: Figure(f"{row.quality.top1_agreement:.1%}")),
    Column("change kept", "1 - KL / KL of the base alone: share of what training changed", _change),
    Column("gain kept", "Share of the fine-tune's gain in log-probability", _gain),
    Column("retention", "Share of the delta in the weights: mean, least", _retention),
    Column("perplexity", "Of the answers", lambda row: Figure(_number(row.quality.perplexity))),
    Column("canaries", "Answers with the expected text", _passed_canaries),
    Column("tokens/s", "Decoding, one stream", lambda row: Figure(_number(row.decode_tokens_per_s))),
)


def _text_name(quality: Quality) -> str:
    return "the default text" if quality.text == "default" else quality.text


def _distance(quality: Quality) -> str:
    return "the same function as trained" if quality.kl_mean == 0 else f"KL {quality.kl_mean:.2g}"


def _storage(row: Row) -> str:
    return "16 bits" if row.quantization == "none" else row.quantization


def _layers_picture(rows: Sequence[Row]) -> str | None:
    """Retention by layer; None where no row is a merged model."""
    merged = [(row.label, row.retained) for row in rows if row.retained]
    return picture.layers(merged) if merged else None


def _canaries(comparison: Comparison) -> Iterator[CanaryAnswers]:
    for number, trained in enumerate(comparison.answers):
        answers = [("as trained", trained)]
        answers += [(row.label, row.answers[number]) for row in comparison.rows if number < len(row.answers)]
        yield CanaryAnswers(trained.canary.messages[-1]["content"], trained.canary.expect, tuple(answers))


def _lineage(comparison: Comparison) -> Iterator[tuple[str, str]]:
    """Names and values of all inputs."""
    origin, base = comparison.origin, comparison.base
    measured = f" (measured, {origin.confidence}; no file says it)" if origin.confidence else ""
    yield "checkpoint", f"{origin.training}{measured}, layout of {origin.layout}"
    yield "evidence", "; ".join(origin.evidence)
    yield "checkpoint digest", origin.digest
    if base:
        yield "base", f"{base.source}{f' at {base.revision}' if base.revision else ''}"
        yield from sorted(base.files.items())
    if comparison.versions:
        yield "versions", ", ".join(f"{name} {version}" for name, version in sorted(comparison.versions.items()))
