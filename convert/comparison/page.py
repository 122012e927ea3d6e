"""A comparison for people: one HTML file with its pictures in it, which asks for nothing from anywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from html import escape
from pathlib import Path

from convert.artifact import Quality
from convert.comparison import picture
from convert.comparison.rows import Comparison, Row
from convert.quality import Answer
from convert.units import readable_bytes

_STYLE = Path(__file__).with_name("page.css")
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_NONE = '<span class="soft">–</span>'  # noqa: RUF001


def comparison_page(comparison: Comparison) -> str:
    """The same comparison gives the same page. Whatever comes from outside is escaped."""
    body = "\n".join(part for part in _parts(comparison) if part)
    title = escape(f"{comparison.name}: ways to serve it")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>\n{_STYLE.read_text(encoding='utf-8')}</style>\n</head>\n"
        f"<body>\n<h1>{title}</h1>\n{body}\n</body>\n</html>\n"
    )


def recommendation(comparison: Comparison) -> str:
    """One sentence, as plain text."""
    row = comparison.chosen
    if row is None:
        return "None of these ways keeps its limits: nothing is recommended."
    kept = [f"{readable_bytes(row.size_bytes)}", _distance(row.quality)]
    if row.quality.gain_kept is not None:
        kept.append(f"{row.quality.gain_kept:.1%} of the fine-tune's gain kept")
    if canaries := row.quality.canaries:
        kept.append(f"{canaries.passed} of {canaries.asked} canaries answered")
    if row.decode_tokens_per_s:
        kept.append(f"{row.decode_tokens_per_s:.3g} tokens/s")
    return f"Take {row.label}: {', '.join(kept)}."


def _parts(comparison: Comparison) -> Iterator[str]:
    rows = comparison.rows
    quality = rows[0].quality
    yield (
        f'<p class="soft">{len(rows)} ways, each compared with the function as trained ({escape(quality.reference)}) '
        f"on {quality.tokens} tokens of {_text_name(quality)}.</p>"
    )
    yield f'<p class="advice{"" if comparison.chosen else " none"}">{escape(recommendation(comparison))}</p>'
    yield _table(rows)
    yield _trade_off(rows)
    yield _retention(rows)
    yield _canaries(comparison)
    yield _failures(rows)
    yield _recoveries(rows)
    yield _commands(rows)
    yield _lineage(comparison)


def _text_name(quality: Quality) -> str:
    return "the default text" if quality.text == "default" else escape(quality.text)


def _distance(quality: Quality) -> str:
    return "the same function as trained" if quality.kl_mean == 0 else f"KL {quality.kl_mean:.2g}"


_COLUMNS: tuple[tuple[str, str, Callable[[Row], str]], ...] = (
    ("size", "Bytes of model and adapter", lambda row: readable_bytes(row.size_bytes)),
    ("KL", "Mean and 99th percentile, nats per token", lambda row: _with_small(_kl(row), _kl_p99(row))),
    ("same token", "Positions with the same best token", lambda row: f"{row.quality.top1_agreement:.1%}"),
    ("gain kept", "Share of the fine-tune's gain in log-probability", lambda row: _gain(row.quality.gain_kept)),
    ("retention", "Share of the delta in the weights: mean, least", lambda row: _retained(row)),
    ("perplexity", "Of the answers", lambda row: _number(row.quality.perplexity)),
    ("canaries", "Answers with the expected text", lambda row: _passed(row)),
    ("tokens/s", "Decoding, one stream", lambda row: _number(row.decode_tokens_per_s)),
)


def _table(rows: Sequence[Row]) -> str:
    heads = "".join(f'<th title="{escape(told)}">{escape(name)}</th>' for name, told, _ in _COLUMNS)
    lines = "".join(_line(row) for row in rows)
    return (
        f'<div class="wide"><table><thead><tr><th>way</th>{heads}<th class="words">limits</th></tr></thead>'
        f"<tbody>{lines}</tbody></table></div>{_yardstick(rows[0].quality)}"
    )


def _yardstick(quality: Quality) -> str:
    if quality.perplexity_reference is None or quality.perplexity_base is None:
        return ""
    return (
        f'<p class="soft">Perplexity of the function as trained {_number(quality.perplexity_reference)}, '
        f"of the base without the adapter {_number(quality.perplexity_base)}.</p>"
    )


def _line(row: Row) -> str:
    cells = "".join(f"<td>{show(row)}</td>" for _, _, show in _COLUMNS)
    stored = "16 bits" if row.quantization == "none" else row.quantization
    name = f"<td>{escape(row.label)}<small>{escape(row.route)}, {escape(stored)}</small></td>"
    kind, verdict = ("passed", "✓ kept") if row.passes else ("failed", "✗ not kept")
    chosen = ' class="chosen"' if row.chosen else ""
    return f'<tr{chosen}>{name}{cells}<td class="verdict"><span class="{kind}">{verdict}</span></td></tr>'


def _failures(rows: Sequence[Row]) -> str:
    failed = [row for row in rows if row.failures]
    if not failed:
        return ""
    told = "".join(
        f"<p>{escape(row.label)}</p><ul>{''.join(f'<li>{escape(failure)}</li>' for failure in row.failures)}</ul>"
        for row in failed
    )
    return f"<h2>Limits not kept</h2>{told}"


def _kl(row: Row) -> str:
    return "0" if row.quality.kl_mean == 0 else f"{row.quality.kl_mean:.2g}"


def _kl_p99(row: Row) -> str:
    return f"p99 {row.quality.kl_p99:.2g}"


def _with_small(value: str, small: str) -> str:
    return f"{value}<small>{small}</small>"


def _gain(kept: float | None) -> str:
    if kept is None:
        return _NONE
    return f'{kept:.1%}<div class="bar"><i style="width:{min(1.0, kept):.1%}"></i></div>'


def _retained(row: Row) -> str:
    kept = row.quality.retention
    if kept is None:
        return _with_small("1", "by construction") if row.route == "adapter" else _NONE
    return _with_small(f"{kept.mean:.3f}", f"least {kept.least:.3f}")


def _passed(row: Row) -> str:
    asked = row.quality.canaries
    return f"{asked.passed} of {asked.asked}" if asked else _NONE


def _number(value: float | None) -> str:
    return _NONE if value is None else f"{value:.3g}"


def _trade_off(rows: Sequence[Row]) -> str:
    speed = any(row.decode_tokens_per_s for row in rows)
    area = " A larger point decodes faster." if speed else ""
    return (
        "<h2>Size against loss</h2>"
        f'<figure role="img" aria-label="Size and KL of each way, as in the table">{picture.trade_off(rows)}'
        f"<figcaption>Further down and left is better. Blue circles keep their limits, orange crosses don't; "
        f"the ring is the recommended way.{area}</figcaption></figure>"
    )


def _retention(rows: Sequence[Row]) -> str:
    merged = [(row.label, row.retained) for row in rows if row.retained]
    if not merged:
        return ""
    return (
        "<h2>What is left of the delta, layer by layer</h2>"
        '<figure role="img" aria-label="Retention of every module by layer, for each merged way">'
        f"{picture.layers(merged)}<figcaption>The change of each written weight, projected on the adapter's delta: "
        "1 is all of it. Whether the weights it was added to were the right ones is for KL to say.</figcaption>"
        "</figure>"
    )


def _canaries(comparison: Comparison) -> str:
    if not comparison.answers:
        return ""
    parts = ["<h2>Canaries</h2>"]
    for number, trained in enumerate(comparison.answers):
        question, expected = trained.canary.messages[-1]["content"], f"expected: {trained.canary.expect}"
        parts.append(f'<p class="question">{escape(question)} <span class="soft">{escape(expected)}</span></p>')
        said = [("as trained", trained)]
        said += [(row.label, row.answers[number]) for row in comparison.rows if number < len(row.answers)]
        lines = "".join(_said(label, answer) for label, answer in said)
        parts.append(f'<div class="wide"><table><tbody>{lines}</tbody></table></div>')
    return "".join(parts)


def _said(label: str, answer: Answer) -> str:
    kind, sign = ("passed", "✓") if answer.passed else ("failed", "✗")
    return (
        f'<tr><td class="words"><span class="{kind}">{sign}</span> {escape(label)}</td>'
        f'<td class="words">{escape(answer.text)}</td></tr>'
    )


def _recoveries(rows: Sequence[Row]) -> str:
    told = [(row.label, row.recovery) for row in rows if row.recovery]
    if not told:
        return ""
    lines = "".join(
        f"<p>{escape(label)}: KL {it.kl_naive:.2g} as it is, {it.kl_start:.2g} with a low-rank fit of rank {it.rank}, "
        f"{it.kl_recovered:.2g} after {it.steps} steps.</p>"
        for label, it in told
    )
    return f"<h2>Recovery</h2>{lines}"


def _commands(rows: Sequence[Row]) -> str:
    lines = "".join(f"<p>{escape(row.label)}</p><pre>{escape(row.command)}</pre>" for row in rows)
    return f"<h2>How to get each</h2>{lines}"


def _lineage(comparison: Comparison) -> str:
    origin, base = comparison.origin, comparison.base
    facts = [
        ("checkpoint", f"{origin.training}, layout of {origin.layout}"),
        ("evidence", "; ".join(origin.evidence)),
        ("checkpoint digest", origin.digest),
    ]
    if base:
        facts.append(("base", f"{base.source}{f' at {base.revision}' if base.revision else ''}"))
        facts += [(name, sha) for name, sha in sorted(base.files.items())]
    if comparison.versions:
        facts.append(("versions", ", ".join(f"{name} {told}" for name, told in sorted(comparison.versions.items()))))
    lines = "".join(f"<dt>{escape(name)}</dt><dd>{escape(told)}</dd>" for name, told in facts)
    return f"<h2>Where it comes from</h2><dl>{lines}</dl>"
