"""`python -m convert plan`: what `run` would write."""

from __future__ import annotations

import typer

from convert.cli import option_groups as groups
from convert.cli import options
from convert.cli.console import print_json, reported_errors
from convert.cli.progress import shown_progress


def add_to(app: typer.Typer) -> None:
    app.command()(groups.with_groups(plan))


def plan(
    *,
    inputs: groups.Inputs,
    route: groups.Route,
    output: groups.Output,
    text: options.Text = None,
    as_json: options.Json = False,
) -> None:
    """Show what `run` would write, tensor by tensor, and the memory and time it would need. Writes nothing."""
    from convert.cli.report.plan import plan_document, plan_screen
    from convert.cli.report.screen import print_screen
    from convert.pipeline.dry_run import dry_run

    with reported_errors(), shown_progress() as progress:
        planned = dry_run(groups.request(inputs, output, text, route_options=route.options()), progress)
        shown = plan_document(planned) if as_json else plan_screen(planned)
    if isinstance(shown, dict):
        print_json(shown)
    else:
        print_screen(shown)
