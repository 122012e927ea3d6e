"""`python -m convert verify`: checks an artifact against its manifest and its golden answers."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

import typer

from convert.artifact import Artifact
from convert.cli import options
from convert.cli.console import exit_on_sigterm, print_json, reported_errors
from convert.cli.progress import shown_progress

_SPEED_STREAMS = (1, 8)


def add_to(app: typer.Typer) -> None:
    app.command()(verify)


def verify(
    artifact: options.ArtifactDirectory,
    base: Annotated[
        Path | None,
        typer.Option(
            metavar="ARTIFACT", help="The artifact that holds the base, where ARTIFACT holds only the adapter."
        ),
    ] = None,
    engine: Annotated[
        bool,
        typer.Option(
            "--engine/--no-engine", help="Also serve it with vLLM and check its answers, or only hash its files."
        ),
    ] = True,
    speed: Annotated[bool, typer.Option("--speed", help="Also measure how fast it decodes.")] = False,
    as_json: options.Json = False,
) -> None:
    """Compare every file of an artifact with its manifest, then serve it and check its answers.

    The answers of vLLM must be those of golden.json.
    """
    if engine:
        _verify_in_engine(artifact, base, speed=speed, as_json=as_json)
    else:
        _verify_files(artifact, as_json=as_json)


def _verify_files(artifact: Path, *, as_json: bool) -> None:
    from convert.cli.report.artifact import artifact_document

    with reported_errors():
        opened = Artifact.open(artifact)
        opened.verify()
    if as_json:
        print_json(artifact_document(opened))
    else:
        typer.echo(f"{artifact} matches its manifest ({opened.manifest.name}).")


def _verify_in_engine(artifact: Path, base: Path | None, *, speed: bool, as_json: bool) -> None:
    from convert.cli.report.screen import print_screen
    from convert.cli.report.verification import verification_screen
    from convert.verification.verify import VerifyOptions
    from convert.verification.verify import verify as verify_artifact

    verify_options = VerifyOptions(speed_streams=_SPEED_STREAMS if speed else ())
    signal.signal(signal.SIGTERM, exit_on_sigterm)
    with reported_errors():
        with shown_progress() as progress:
            opened = Artifact.open(artifact)
            base_artifact = Artifact.open(base) if base else None
            report = verify_artifact(opened, base_artifact, verify_options, progress)
        if as_json:
            print_json(report.document())
        else:
            print_screen(verification_screen(report))
        report.require_passed()
