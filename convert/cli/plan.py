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
    canaries: options.CanaryFile = None,
    measure: options.Measure = True,
    as_json: options.Json = False,
) -> None:
    """Show what `run` would write, tensor by tensor, and the memory and time it would need. Writes nothing."""
    from convert.cli.report.plan import plan_document, plan_screen
    from convert.cli.report.screen import print_screen
    from convert.pipeline.dry_run import dry_run

    settings = {"route_options": route.route_options(), "canaries": canaries, "measure": measure}
    with reported_errors():  # the screen shows notes for which the tokenizer is loaded
        with shown_progress() as progress:
            planned = dry_run(groups.request(inputs, output, text, **settings), progress)
        if as_json:
            print_json(plan_document(planned))
        else:
            print_screen(plan_screen(planned))
