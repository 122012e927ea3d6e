"""`python -m serve usage`: the requests and tokens of each key."""

from __future__ import annotations

from typing import Annotated

import typer

from serve.cli.command import expand_options
from serve.cli.console import print_rows, reported_errors
from serve.cli.options import QueryOptions

_COLUMNS = ("day", "key", "model", "requests", "prompt_tokens", "completion_tokens")


def add_to(app: typer.Typer) -> None:
    """Make `usage` a command of `app`."""
    app.command()(usage)


@expand_options
def usage(
    options: QueryOptions,
    since: Annotated[str | None, typer.Option(help="First day, as 2026-01-31, in UTC; default: --until.")] = None,
    until: Annotated[str | None, typer.Option(help="Last day; default: today.")] = None,
) -> None:
    """Requests and tokens by day, key and model. A request counts when it has ended."""
    parameters = "&".join(f"{name}={day}" for name, day in (("since", since), ("until", until)) if day)
    with reported_errors():
        report = options.client().call("GET", f"/admin/v1/usage?{parameters}")
    print_rows(report["usage"], _COLUMNS, options.as_json, report)
