"""The command line application: every command of `python -m serve`."""

from __future__ import annotations

import typer

from serve.cli import adapters, advise, exporter, keys, pools, rollouts, run, size, usage

app = typer.Typer(
    name="graft-serve",
    help="Serve what `convert` published: merged models, and base models with hot-swapped adapters, by OpenAI's API.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

run.add_to(app)
adapters.add_to(app)
exporter.add_to(app)
rollouts.add_to(app)
size.add_to(app)
advise.add_to(app)
pools.add_to(app)
keys.add_to(app)
usage.add_to(app)
