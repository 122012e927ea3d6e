"""`python -m convert compare`: builds and measures the route variants of a checkpoint, and compares them."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Annotated

import typer

from convert.cli import option_groups as groups
from convert.cli import options
from convert.cli.console import exit_on_sigterm, print_json, reported_errors
from convert.cli.progress import shown_progress


def add_to(app: typer.Typer) -> None:
    app.command()(groups.with_groups(compare))


def compare(
    *,
    inputs: groups.Inputs,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Where comparison.html and .json appear; must not exist yet.")
    ],
    way: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ROUTE:STORED[:WEIGHTS]",
            help="A route variant to compare, such as merge:none or merge:nf4:original; can be given more than once. "
            "Default: all that `inspect` lists.",
        ),
    ] = None,
    speed: Annotated[
        bool, typer.Option("--speed", help="Also serve each variant with vLLM, and measure how fast it decodes.")
    ] = False,
    output: groups.Output,
    text: options.Text = None,
    canaries: options.CanaryFile = None,
    limits: groups.Limits,
    as_json: options.Json = False,
) -> None:
    """Build and measure every way to serve a checkpoint, and write a page that compares size and loss.

    The models that are built for it are removed again.
    """
    from convert.cli.report.comparison import comparison_screen
    from convert.cli.report.screen import print_screen
    from convert.pipeline.compare import DOCUMENT, write_report
    from convert.pipeline.compare import compare as compare_variants

    request = groups.request(inputs, output, text, canaries=canaries, gate=limits.gate())
    signal.signal(signal.SIGTERM, exit_on_sigterm)
    with reported_errors(), shown_progress() as progress:
        compared = compare_variants(request, way, speed=speed, progress=progress)
        write_report(compared, out)
    if as_json:
        print_json(json.loads((out / DOCUMENT).read_bytes()))
    else:
        print_screen(comparison_screen(compared, out))
