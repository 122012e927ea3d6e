"""`python -m convert run`: converts a checkpoint to an artifact."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

import typer
from pydantic import TypeAdapter, ValidationError

from convert.artifact import Name
from convert.cli import options
from convert.cli.console import exit_on_sigterm, print_json, reported_errors
from convert.cli.progress import shown_progress


def add_to(app: typer.Typer) -> None:
    app.command()(run)


def run(
    checkpoint: options.Checkpoint,
    base: options.Base,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the artifact appears; must not exist yet.")],
    name: Annotated[
        str | None, typer.Option(help="Name under which it is served. Default: the name of DIR, in lower case.")
    ] = None,
    route: options.Route = "auto",
    quantize: options.Quantize = "auto",
    merge_onto: options.MergeOnto = "auto",
    rank: options.Rank = None,
    steps: options.Steps = 60,
    method: options.Method = "rtn",
    calibration: options.Calibration = None,
    dtype: options.Dtype = "auto",
    target: options.Target = None,
    trained_on: options.TrainedOn = None,
    text: options.Text = None,
    canaries: options.CanaryFile = None,
    max_kl: options.MaxKl = None,
    min_retention: options.MinRetention = None,
    min_gain: options.MinGain = None,
    measure: options.Measure = True,
    force: options.Force = False,
    as_json: options.Json = False,
) -> None:
    """Convert a checkpoint to an artifact. DIR appears only when the artifact is complete."""
    from convert.cli.report.artifact import artifact_document, artifact_screen
    from convert.cli.report.screen import print_screen
    from convert.pipeline.convert import Destination, convert
    from convert.pipeline.request import Request
    from convert.quality import Gate
    from convert.routes.choose import RouteOptions

    request = Request(
        checkpoint=checkpoint,
        base=base,
        route_options=RouteOptions(route, quantize, merge_onto, dtype, force),
        target=target,
        rank=rank,
        steps=steps,
        method=method,
        calibration=calibration,
        trained_on=options.training_of(trained_on),
        text=text,
        canaries=canaries,
        gate=Gate(max_kl, min_retention, min_gain),
        measure=measure,
    )
    destination = Destination(out, _served_name(name, out))
    signal.signal(signal.SIGTERM, exit_on_sigterm)
    with reported_errors(), shown_progress() as progress:
        artifact = convert(request, destination, progress)
    if as_json:
        print_json(artifact_document(artifact))
    else:
        print_screen(artifact_screen(artifact))


def _served_name(name: str | None, out: Path) -> str:
    """The name that the user gives, else that of the directory. Raises BadParameter where no server accepts it."""
    candidate = name if name is not None else out.resolve().name.lower()
    try:
        return TypeAdapter[str](Name).validate_python(candidate)
    except ValidationError:
        hint = "--name" if name is not None else "--out"
        raise typer.BadParameter(
            f"{candidate!r} can't be served under that name: use a-z, 0-9, '.', '_' and '-', at most 64 characters, "
            "beginning and ending with a letter or digit. Give one with --name.",
            param_hint=hint,
        ) from None
