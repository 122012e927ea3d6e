"""The command line application: every command, and what holds for all of them."""

from __future__ import annotations

import typer

from convert.cli import compare, inspect, plan, run, sign, verify
from convert.cli.usual_messages import hide_usual_messages

app = typer.Typer(
    help="Convert a LoRA or QLoRA checkpoint to an artifact that can be served.",
    epilog="Exit status: 0 success; 1 wrong input; 2 wrong use; 3 limit missed; 4 artifact differs from its manifest.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.callback()(hide_usual_messages)
inspect.add_to(app)
plan.add_to(app)
run.add_to(app)
compare.add_to(app)
sign.add_to(app)
verify.add_to(app)
