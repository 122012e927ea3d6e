"""`python -m convert inspect`: what a checkpoint is."""

from __future__ import annotations

import typer

from convert.cli import options
from convert.cli.console import print_json, reported_errors
from convert.errors import CheckpointUnsupported


def add_to(app: typer.Typer) -> None:
    app.command()(inspect)


def inspect(checkpoint: options.Checkpoint, base: options.OptionalBase = None, as_json: options.Json = False) -> None:
    """Show what a checkpoint is and how it can be served. Writes nothing."""
    from convert.cli.report.inspection import inspection_document, inspection_screen
    from convert.cli.report.screen import print_screen
    from convert.pipeline.inspect import inspect as inspect_checkpoint

    with reported_errors():
        inspection = inspect_checkpoint(checkpoint, base)
        if as_json:
            print_json(inspection_document(inspection))
        else:
            print_screen(inspection_screen(inspection))
        if inspection.problems:
            raise CheckpointUnsupported(
                f"{checkpoint} can't be converted: {len(inspection.problems)} problems, listed above."
            )
        if inspection.obstacle:
            raise inspection.obstacle
