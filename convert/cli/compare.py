"""`python -m convert compare`: builds and measures the route variants of a checkpoint, and compares them."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Annotated

import typer

from convert.cli import options
from convert.cli.console import exit_on_sigterm, print_json, reported_errors
from convert.cli.progress import shown_progress


def add_to(app: typer.Typer) -> None:
    app.command()(compare)


def compare(
    checkpoint: options.Checkpoint,
    base: options.Base,
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
    rank: options.Rank = None,
    steps: options.Steps = 60,
    method: options.Method = "rtn",
    calibration: options.Calibration = None,
    target: options.Target = None,
    trained_on: options.TrainedOn = None,
    text: options.Text = None,
    canaries: options.CanaryFile = None,
    max_kl: options.MaxKl = None,
    min_retention: options.MinRetention = None,
    min_gain: options.MinGain = None,
    as_json: options.Json = False,
) -> None:
    """Build and measure every way to serve a checkpoint, and write a page that compares size and loss.

    The models that are built for it are removed again.
    """
    from convert.cli.report.comparison import comparison_screen
    from convert.cli.report.screen import print_screen
    from convert.pipeline.compare import DOCUMENT, write_report
    from convert.pipeline.compare import compare as compare_variants
    from convert.pipeline.request import Request
    from convert.quality import Gate

    request = Request(
        checkpoint=checkpoint,
        base=base,
        target=target,
        rank=rank,
        steps=steps,
        method=method,
        calibration=calibration,
        trained_on=options.training_of(trained_on),
        text=text,
        canaries=canaries,
        gate=Gate(max_kl, min_retention, min_gain),
    )
    signal.signal(signal.SIGTERM, exit_on_sigterm)
    with reported_errors(), shown_progress() as progress:
        compared = compare_variants(request, way, speed=speed, progress=progress)
        write_report(compared, out)
    if as_json:
        print_json(json.loads((out / DOCUMENT).read_bytes()))
    else:
        print_screen(comparison_screen(compared, out))
