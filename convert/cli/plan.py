"""`python -m convert plan`: what `run` would write."""

from __future__ import annotations

import typer

from convert.cli import options
from convert.cli.console import print_json, reported_errors
from convert.cli.progress import shown_progress


def add_to(app: typer.Typer) -> None:
    app.command()(plan)


def plan(
    checkpoint: options.Checkpoint,
    base: options.Base,
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
    force: options.Force = False,
    as_json: options.Json = False,
) -> None:
    """Show what `run` would write, tensor by tensor, and the memory and time it would need. Writes nothing."""
    from convert.cli.report.plan import plan_document, plan_screen
    from convert.cli.report.screen import print_screen
    from convert.pipeline.dry_run import dry_run
    from convert.pipeline.request import Request
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
    )
    with reported_errors(), shown_progress() as progress:
        planned = dry_run(request, progress)
    if as_json:
        print_json(plan_document(planned))
    else:
        print_screen(plan_screen(planned))
