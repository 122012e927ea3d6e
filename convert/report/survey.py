"""A comparison in short."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table
from rich.text import Text

from convert.report.page import Page
from convert.survey import PAGE, Surveyed
from convert.units import readable_bytes


def survey_page(surveyed: Surveyed, directory: Path) -> Page:
    """The comparison in short, and where the page lies."""
    table = Table(title="Compared with the function as trained", title_justify="left", title_style="bold")
    for heading in ("way", "size", "KL", "gain kept", "canaries", "tokens/s", ""):
        table.add_column(heading)
    for row in surveyed.comparison.rows:
        quality = row.quality
        table.add_row(
            row.label,
            readable_bytes(row.size_bytes),
            f"{quality.kl_mean:.2g}",
            "-" if quality.gain_kept is None else f"{quality.gain_kept:.0%}",
            f"{quality.canaries.passed} of {quality.canaries.asked}" if quality.canaries else "-",
            f"{row.decode_tokens_per_s:.1f}" if row.decode_tokens_per_s else "-",
            "chosen" if row.chosen else ("" if row.passes else "fails"),
        )
    obstacles = [Text(f"Not compared: {obstacle}", style="yellow") for obstacle in surveyed.obstacles]
    return table, *obstacles, Text(f"\n{directory / PAGE}")
