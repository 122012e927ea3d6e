"""`python -m convert sign`: writes a signature of the adapter beside the manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from convert.artifact import Artifact
from convert.cli import options
from convert.cli.console import reported_errors


def add_to(app: typer.Typer) -> None:
    app.command()(sign)


def sign(
    artifact: options.ArtifactDirectory,
    key: Annotated[Path, typer.Option(help="Ed25519 private key in PEM: openssl genpkey -algorithm ed25519")],
) -> None:
    """Sign an artifact's adapter, for servers that load only adapters signed with a key they trust.

    Hashes every file first, then writes manifest.sig beside the manifest. Give the server the public key:
    openssl pkey -in KEY.pem -pubout.
    """
    from convert.artifact import signature

    with reported_errors():
        opened = Artifact.open(artifact)
        opened.verify()
        typer.echo(f"signed: {signature.sign(opened, key)}")
