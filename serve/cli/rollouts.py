"""The commands that give a second revision of an adapter a share of its traffic."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from pydantic import BaseModel

from serve.catalogue.split import Kind, SplitPolicy
from serve.cli.command import expand_options
from serve.cli.console import print_change, reported_errors
from serve.cli.options import AdapterName, ChangeOptions

SecondRevision = Annotated[
    str | None, typer.Argument(metavar="REVISION", help="12 or more digits of a revision that is known.")
]
Share = Annotated[float, typer.Option(min=0, max=1, help="Share of the traffic.")]
End = Annotated[bool, typer.Option("--end", help="End it; all traffic goes where the name points.")]

_POLICY = SplitPolicy()


class _CanaryPolicyOptions(BaseModel):
    share: Share = _POLICY.share
    max_error_rate: Annotated[
        float, typer.Option(min=0, max=1, help="Its share of failed requests may be higher by this.")
    ] = _POLICY.max_error_rate
    max_latency_ratio: Annotated[
        float, typer.Option(min=1, help="Its median first byte may take this many times as long.")
    ] = _POLICY.max_latency_ratio
    min_requests: Annotated[int, typer.Option(min=1, help="With fewer requests nothing is decided.")] = (
        _POLICY.min_requests
    )
    end: End = False


class CanaryOptions(ChangeOptions, _CanaryPolicyOptions):
    """The options of `canary`. `--help` lists the options of the last base class first."""

    def policy(self) -> dict[str, Any]:
        """The fields of a SplitPolicy."""
        return self.model_dump(include={"share", "max_error_rate", "max_latency_ratio", "min_requests"})


def add_to(app: typer.Typer) -> None:
    """Make every command below a command of `app`."""
    for command in (canary, shadow):
        app.command()(command)


@expand_options
def canary(options: CanaryOptions, name: AdapterName, revision: SecondRevision = None) -> None:
    """Give a share of an adapter's callers another revision of it.

    A caller always gets the same revision. Every replica loads the second revision first. The canary ends by itself if
    the second revision turns out worse than the one that the name points to. To give all callers the second revision,
    promote it.
    """
    wanted = _wanted_revision(revision, options.end)
    with reported_errors():
        _begin_or_end(options, "canary", name, wanted, options.policy())


@expand_options
def shadow(
    options: ChangeOptions,
    name: AdapterName,
    revision: SecondRevision = None,
    share: Share = _POLICY.share,
    end: End = False,
) -> None:
    """Send copies of a share of an adapter's requests to another revision; nobody sees what it answers.

    `status --json` shows how often both gave the same answer. A busy server drops copies first.
    """
    wanted = _wanted_revision(revision, end)
    with reported_errors():
        _begin_or_end(options, "shadow", name, wanted, {"share": share})


def _wanted_revision(revision: str | None, end: bool) -> str | None:
    """The revision that was given; None to end a split. Raises BadParameter for both or neither."""
    if end == (revision is not None):
        raise typer.BadParameter("Give either a REVISION or --end.")
    return revision.rpartition("@")[2] if revision else None


def _begin_or_end(options: ChangeOptions, kind: Kind, name: str, revision: str | None, policy: dict[str, Any]) -> None:
    """Begin the split, or end it if `revision` is None."""
    if revision:
        body = {"revision": revision, "reason": options.reason, **policy}
        answer = options.client().begin_split(kind, name, body)
        outcome = f"gets {policy['share']:.0%} of it as {revision}"
    else:
        answer, outcome = options.client().end_split(kind, name, options.reason), "has ended"
    print_change(answer, options.as_json, f"The {kind} of [bold]{{model}}[/] {outcome}, {{on_replicas}}.")
