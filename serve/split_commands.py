"""The commands that give a second revision of an adapter a share of its traffic."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from serve.commands import DEFAULT_STATE, AdapterName, AsJson, LocalOption, Reason, StateOption, UrlOption, client_of
from serve.output import tell, told_errors
from serve.remote import AdminClient
from serve.split import Kind, Terms

SecondRevision = Annotated[
    str | None, typer.Argument(metavar="REVISION", help="12 or more digits of a revision that is known.")
]
Share = Annotated[float, typer.Option(min=0, max=1, help="Of the traffic.")]
End = Annotated[bool, typer.Option("--end", help="End it; all traffic goes where the name points.")]

_TERMS = Terms()


def add_to(app: typer.Typer) -> None:
    """Make every command below a command of `app`."""
    for command in (canary, shadow):
        app.command()(command)


def canary(
    name: AdapterName,
    revision: SecondRevision = None,
    share: Share = _TERMS.share,
    max_error_rate: Annotated[
        float, typer.Option(min=0, max=1, help="It may fail this share of its requests more often.")
    ] = _TERMS.max_error_rate,
    max_latency_ratio: Annotated[
        float, typer.Option(min=1, help="Its median first byte may take this many times as long.")
    ] = _TERMS.max_latency_ratio,
    min_requests: Annotated[int, typer.Option(min=1, help="Nothing is decided on fewer.")] = _TERMS.min_requests,
    end: End = False,
    reason: Reason = "",
    state: StateOption = DEFAULT_STATE,
    local: LocalOption = None,
    url: UrlOption = None,
    as_json: AsJson = False,
) -> None:
    """Give a share of an adapter's callers another revision of it.

    Each caller stays on its side. Every replica loads the revision first. It is given up by itself if it turns out
    worse than the one that the name points to. Promoting it gives it everyone.
    """
    terms = {
        "share": share,
        "max_error_rate": max_error_rate,
        "max_latency_ratio": max_latency_ratio,
        "min_requests": min_requests,
    }
    wanted = _wanted_revision(revision, end)
    with told_errors():
        _split(client_of(state, local, url), "canary", name, wanted, terms, reason, as_json)


def shadow(
    name: AdapterName,
    revision: SecondRevision = None,
    share: Share = _TERMS.share,
    end: End = False,
    reason: Reason = "",
    state: StateOption = DEFAULT_STATE,
    local: LocalOption = None,
    url: UrlOption = None,
    as_json: AsJson = False,
) -> None:
    """Send copies of a share of an adapter's requests to another revision; nobody sees what it answers.

    `status --json` tells how often both said the same. Copies are the first to go when the server is busy.
    """
    wanted = _wanted_revision(revision, end)
    with told_errors():
        _split(client_of(state, local, url), "shadow", name, wanted, {"share": share}, reason, as_json)


def _wanted_revision(revision: str | None, end: bool) -> str | None:
    """None to end it."""
    if end == (revision is not None):
        raise typer.BadParameter("Give either a REVISION or --end.")
    return revision.rpartition("@")[2] if revision else None


def _split(
    client: AdminClient, kind: Kind, name: str, revision: str | None, terms: dict[str, Any], reason: str, as_json: bool
) -> None:
    """Begin it with a revision, end it without."""
    if revision:
        answer = client.begin_split(kind, name, {"revision": revision, "reason": reason, **terms})
        told = f"gets {terms['share']:.0%} of it as {revision}"
    else:
        answer, told = client.end_split(kind, name, reason), "has ended"
    tell(answer, as_json, f"The {kind} of [bold]{{model}}[/] {told}, on {{replicas}} replicas.")
