"""`python -m convert run`: converts a checkpoint to an artifact."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

import typer
from pydantic import TypeAdapter, ValidationError

from convert.artifact import Name
from convert.cli import option_groups as groups
from convert.cli import options
from convert.cli.console import exit_on_sigterm, print_json, reported_errors
from convert.cli.progress import shown_progress


def add_to(app: typer.Typer) -> None:
    app.command()(groups.with_groups(run))


def run(
    *,
    inputs: groups.Inputs,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the artifact appears; must not exist yet.")],
    name: Annotated[
        str | None, typer.Option(help="Name under which it is served. Default: the name of DIR, in lower case.")
    ] = None,
    route: groups.Route,
    output: groups.Output,
    text: options.Text = None,
    canaries: options.CanaryFile = None,
    measure: options.Measure = True,
    limits: groups.Limits,
    keep_finished: Annotated[
        bool,
        typer.Option(
            help="Succeed if DIR already is the artifact of this same conversion, run with this option: for a Job that "
            "is tried again."
        ),
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Convert a checkpoint to an artifact. DIR appears only when the artifact is complete."""
    from convert.cli.report.artifact import artifact_document, artifact_screen
    from convert.cli.report.screen import print_screen
    from convert.pipeline.convert import Destination, convert

    settings = {"route_options": route.route_options(), "canaries": canaries, "gate": limits.gate(), "measure": measure}
    request = groups.request(inputs, output, text, **settings)
    destination = Destination(out, _served_name(name, out), keep_finished)
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
