"""The command that tells who used what."""

from __future__ import annotations

from typing import Annotated

import typer

from serve.commands import DEFAULT_STATE, AsJson, LocalOption, StateOption, UrlOption, client_of
from serve.output import table, told_errors

_COLUMNS = ("day", "key", "model", "requests", "prompt_tokens", "completion_tokens")


def add_to(app: typer.Typer) -> None:
    app.command()(usage)


def usage(
    since: Annotated[str | None, typer.Option(help="First day, as 2026-01-31, in UTC; default: --until.")] = None,
    until: Annotated[str | None, typer.Option(help="Last day; default: today.")] = None,
    state: StateOption = DEFAULT_STATE,
    local: LocalOption = None,
    url: UrlOption = None,
    as_json: AsJson = False,
) -> None:
    """Requests and tokens by day, key and model. What runs now counts when it has ended."""
    asked = "&".join(f"{name}={day}" for name, day in (("since", since), ("until", until)) if day)
    with told_errors():
        found = client_of(state, local, url).call("GET", f"/admin/v1/usage?{asked}")
    table(found["usage"], _COLUMNS, as_json, found)
