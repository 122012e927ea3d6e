"""The screen of a comparison."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from convert.cli.report.screen import Page
from convert.pipeline.compare import PAGE, ComparisonRun
from convert.pipeline.comparison import Row


def comparison_screen(run: ComparisonRun, directory: Path) -> Page:
    """A summary table of the comparison, and the path of its page."""
    obstacles = [Text(f"Not compared: {obstacle}", style="yellow") for obstacle in run.obstacles]
    return _table(run.comparison.rows), *obstacles, Text(f"\n{directory / PAGE}")


def _table(rows: Sequence[Row]) -> Table:
    """A figure that no row has gets no column, so that the labels fit into 80 columns."""
    columns = [(heading, [cell(row) for row in rows]) for heading, cell in _COLUMNS]
    columns = [(heading, cells) for heading, cells in columns if any(cell != _NONE for cell in cells)]
    table = Table(title="Compared with the function as trained", title_justify="left", title_style="bold")
    for heading, _ in columns:
        table.add_column(heading, no_wrap=heading != _LABEL)
    for line in zip(*(cells for _, cells in columns), strict=True):
        table.add_row(*line)
    return table


def _gain(row: Row) -> str:
    return _NONE if row.quality.gain_kept is None else f"{row.quality.gain_kept:.0%}"


def _distance(row: Row) -> str:
    return _NONE if row.quality.distance_kept is None else f"{row.quality.distance_kept:.0%}"


def _canaries(row: Row) -> str:
    canaries = row.quality.canaries
    return f"{canaries.passed} of {canaries.asked}" if canaries else _NONE


def _speed(row: Row) -> str:
    return f"{row.decode_tokens_per_s:.1f}" if row.decode_tokens_per_s else _NONE


def _verdict(row: Row) -> str:
    return "chosen" if row.chosen else ("" if row.passes else "fails")


_LABEL, _NONE = "way", "-"
_COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    (_LABEL, lambda row: escape(row.label)),
    ("size", lambda row: decimal(row.size_bytes)),
    ("KL", lambda row: f"{row.quality.kl_mean:.2g}"),
    ("change\nkept", _distance),
    ("gain\nkept", _gain),
    ("canaries", _canaries),
    ("tokens/s", _speed),
    ("", _verdict),
)
