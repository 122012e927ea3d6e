"""The screen of a verification."""

from __future__ import annotations

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from convert.cli.report.screen import Page
from convert.verification.verify import VerificationReport

_VERDICTS = {True: "[green]passed[/]", False: "[bold red]FAILED[/]", None: "no limit"}


def verification_screen(report: VerificationReport) -> Page:
    """A table of the checks, then their details, then the verdict."""
    table = Table(title=f"{escape(report.name)} in vLLM {report.vllm}", title_justify="left", title_style="bold")
    for heading in ("check", "", "found", "expected"):
        table.add_column(heading, overflow="fold")
    for check in report.checks:
        table.add_row(check.name, _VERDICTS[check.passed], escape(check.found), escape(check.expected))
    parts: list[RenderableType] = [table]
    parts += [Text(f"  {check.name}: {detail}") for check in report.checks for detail in check.details]
    parts += [Text(f"  decode, {speed.streams} at once: {speed.tokens_per_s:.1f} tokens/s") for speed in report.speed]
    failed = len(report.failures)
    parts.append(
        Text(f"{failed} of {len(report.checks)} checks failed: don't serve it.", style="bold red")
        if failed
        else Text(f"{report.artifact} matches its manifest, and vLLM gives its golden answers.")
    )
    return tuple(parts)
