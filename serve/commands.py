"""The commands that change and show the adapters of a running server."""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from convert.artifact import Artifact
from serve.intake import candidate_of
from serve.output import err, print_json, table, tell, tell_moved, told_errors
from serve.remote import TOKEN_VARIABLE, AdminClient
from serve.state import StateDir

DEFAULT_STATE = "graft-state"

StateOption = Annotated[
    str,
    typer.Option(
        "--state",
        help="Where the catalogue and the adapters live: a directory, or s3://, gs:// or az://BUCKET/PREFIX.",
    ),
]
LocalOption = Annotated[
    Path | None, typer.Option("--local", help="With an object store: the directory of what is this machine's.")
]
UrlOption = Annotated[
    str | None, typer.Option("--url", help=f"A server on another machine; its token in {TOKEN_VARIABLE}.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Reason = Annotated[str, typer.Option("--reason", help="Why; history keeps it.")]
AdapterName = Annotated[str, typer.Argument(metavar="NAME", help="The adapter's name, as clients write it.")]
AnyRevision = Annotated[
    str, typer.Argument(metavar="NAME[@REVISION]", help="A revision of an adapter; without @, the current one.")
]
OneRevision = Annotated[str, typer.Argument(metavar="NAME@REVISION", help="As `show` and `list` print it.")]


def add_to(app: typer.Typer) -> None:
    """Make every command below a command of `app`."""
    commands = (
        publish,
        promote,
        rollback,
        abandon,
        retire,
        pin,
        unpin,
        list_adapters,
        show,
        history,
        apply,
        follow,
        status,
    )
    for command in commands:
        app.command(name=command.__name__.removesuffix("_adapters"))(command)


def publish(
    artifact: Annotated[Path, typer.Argument(help="An artifact with an adapter for the base that is served.")],
    name: Annotated[str | None, typer.Option(help="Publish under this name; default: the artifact's own.")] = None,
    stage_only: Annotated[
        bool, typer.Option("--stage-only", help="Load it everywhere as NAME@REVISION; the name moves with `promote`.")
    ] = False,
    reason: Reason = "",
    state: StateOption = DEFAULT_STATE,
    local: LocalOption = None,
    url: UrlOption = None,
    as_json: AsJson = False,
) -> None:
    """Publish an adapter, or a new revision of one, to the running server.

    Every replica loads it first and proves on its engine that it changes the base's answers, and gives the ones that
    it was converted with; then the name points to it everywhere. Requests that are running finish on the revision
    they began with. If one replica can't, nothing changes.
    """
    with told_errors():
        candidate_of(Artifact.open(artifact), name)  # told before a server is looked for
        answer = client_of(state, local, url).publish(artifact, name, stage_only=stage_only, reason=reason)
    if stage_only:
        tell(answer, as_json, "[bold]{revision}[/] is staged on {replicas} replicas ({staged_s} s).")
    else:
        tell_moved(answer, as_json)


def promote(
    adapter: OneRevision,
    reason: Reason = "",
    state: StateOption = DEFAULT_STATE,
    local: LocalOption = None,
    url: UrlOption = None,
    as_json: AsJson = False,
) -> None:
    """Point a name to a revision that is staged, or that served before."""
    with told_errors():
        tell_moved(client_of(state, local, url).change("promote", *_split(adapter, required=True), reason), as_json)


def rollback(
    name: AdapterName,
    to: Annotated[str | None, typer.Option("--to", help="REVISION to go back to; default: the one before.")] = None,
    reason: Reason = "",
    state: StateOption = DEFAULT_STATE,
    local: LocalOption = None,
    url: UrlOption = None,
    as_json: AsJson = False,
) -> None:
    """Point a name back to the revision before. It is still resident, so nothing is loaded.

    A second rollback goes one further back, never to what was rolled back from.
    """
    with told_errors():
        revision = to.rpartition("@")[2] if to else None
        tell_moved(client_of(state, local, url).roll_back(name, revision, reason), as_json)


def abandon(
    adapter: OneRevision,
    reason: Reason = "",
    state: StateOption = DEFAULT_STATE,
    local: LocalOption = None,
    url: UrlOption = None,
    as_json: AsJson = False,
) -> None:
    """Give a staged revision up: every replica lets go of it."""
    with told_errors():
        answer = client_of(state, local, url).change("abandon", *_split(adapter, required=True), reason)
        tell(answer, as_json, f"[bold]{adapter}[/] is given up.")


def retire(
    name: AdapterName,
    reason: Reason = "",
    state: StateOption = DEFAULT_STATE,
    local: LocalOption = None,
    url: UrlOption = None,
    as_json: AsJson = False,
) -> None:
    """Take an adapter away from the running server.

    New requests for it get a 404, running ones finish. Publishing it, or giving it to `run`, brings it back.
    """
    with told_errors():
        answer = client_of(state, local, url).retire(name, reason)
        tell(answer, as_json, "[bold]{model}[/] is retired on {replicas} replicas.")


def pin(
    adapter: AnyRevision,
    reason: Reason = "",
    state: StateOption = DEFAULT_STATE,
    local: LocalOption = None,
    url: UrlOption = None,
    as_json: AsJson = False,
) -> None:
    """Keep a revision resident on every replica; it is not retired until it is unpinned."""
    with told_errors():
        answer = client_of(state, local, url).change("pin", *_split(adapter), reason)
        tell(answer, as_json, "[bold]{revision}[/] is pinned.")


def unpin(
    adapter: AnyRevision,
    reason: Reason = "",
    state: StateOption = DEFAULT_STATE,
    local: LocalOption = None,
    url: UrlOption = None,
    as_json: AsJson = False,
) -> None:
    """Let a pinned revision come and go with its use again."""
    with told_errors():
        answer = client_of(state, local, url).change("unpin", *_split(adapter), reason)
        tell(answer, as_json, "[bold]{revision}[/] is no longer pinned.")


def list_adapters(
    state: StateOption = DEFAULT_STATE, local: LocalOption = None, url: UrlOption = None, as_json: AsJson = False
) -> None:
    """Every adapter with the revision it means, the one before, and what is staged or pinned."""
    with told_errors():
        found = client_of(state, local, url).adapters()
    table(found, ("name", "current", "previous", "staged", "pinned"), as_json, {"adapters": found})


def show(
    name: AdapterName,
    state: StateOption = DEFAULT_STATE,
    local: LocalOption = None,
    url: UrlOption = None,
    as_json: AsJson = False,
) -> None:
    """All revisions of an adapter: state, reason, author, and where each came from (with --json)."""
    with told_errors():
        found = client_of(state, local, url).show(name)
    table(found["revisions"], ("revision", "state", "pinned", "at", "by", "reason"), as_json, found)


def history(
    name: Annotated[str | None, typer.Argument(help="Of one adapter; default: of all.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="At most so many entries, the newest.")] = 50,
    state: StateOption = DEFAULT_STATE,
    local: LocalOption = None,
    url: UrlOption = None,
    as_json: AsJson = False,
) -> None:
    """What was done, by whom, when and why; newest first."""
    with told_errors():
        found = client_of(state, local, url).history(name, limit)
    table(found, ("epoch", "at", "by", "verb", "revision", "reason"), as_json, {"history": found})


def apply(
    file: Annotated[Path, typer.Argument(help="adapters.yaml: which adapters there shall be.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done, and do nothing.")] = False,
    state: StateOption = DEFAULT_STATE,
    local: LocalOption = None,
    url: UrlOption = None,
    as_json: AsJson = False,
) -> None:
    """Bring the running server to what a file says. Doing it twice changes nothing the second time."""
    from serve import desired

    with told_errors():
        wanted = desired.Desired.read(file)
        client = client_of(state, local, url)
        steps = desired.diff(wanted, client.adapters())
        failed = {} if dry_run else desired.apply(wanted, steps, client)
    if as_json:
        failures = [{"step": str(it), "code": error.code, "message": str(error)} for it, error in failed.items()]
        print_json({"steps": [str(it) for it in steps], "applied": not dry_run, "failed": failures})
    else:
        verb = "would " if dry_run else ""
        for step in (it for it in steps if it not in failed):
            err.print(f"{verb}{step}", highlight=False)
        if not steps:
            err.print("Nothing to change.")
        for step, error in failed.items():
            err.print(f"error[{error.code}]: {step}: {error}", markup=False, highlight=False, soft_wrap=True)
    if failed:
        raise typer.Exit(1)


def follow(
    file: Annotated[Path, typer.Argument(help="adapters.yaml: which adapters there shall be.")],
    state: StateOption = DEFAULT_STATE,
    local: LocalOption = None,
    url: UrlOption = None,
) -> None:
    """Apply a file to the running server now, and again whenever it changes, until Ctrl-C or SIGTERM.

    A rollback that someone makes by hand stays until the file says something else.
    """
    from serve.watch import Watcher, watching

    with told_errors():
        directory = StateDir(state, local)
        directory.prepare()
        client = AdminClient.of(directory, url)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt), watching(Watcher(file, client, _tell_line)):
        signal.pause()


def status(
    state: StateOption = DEFAULT_STATE, local: LocalOption = None, url: UrlOption = None, as_json: AsJson = False
) -> None:
    """What every replica of the running server holds, what it failed to load, and what it had to mend."""
    with told_errors():
        client = client_of(state, local, url)
        found = client.replicas()
    if as_json:
        print_json({"replicas": found, "url": client.url})
        return
    shown = Table(
        "replica", "epoch", "adapters in the engine", "running requests", "failures", "repairs", title=client.url
    )
    for replica in found:
        failures = "; ".join(f"{model}: {why}" for model, why in replica["failures"].items())
        held, repairs = "\n".join(replica["resident"]), "\n".join(replica["repairs"])
        row = (replica["replica"], str(replica["epoch"]), held, str(replica["running_requests"]), failures, repairs)
        shown.add_row(*row)
    Console().print(shown)


def _tell_line(line: str) -> None:
    err.print(line, markup=False)


def client_of(state: str, local: Path | None, url: str | None) -> AdminClient:
    """The admin API of the server that these options name. Raises ServerNotRunning."""
    return AdminClient.of(StateDir(state, local), url)


def _split(adapter: str, *, required: bool = False) -> tuple[str, str | None]:
    name, separator, revision = adapter.partition("@")
    if required and not revision:
        raise typer.BadParameter(f"{adapter!r} names no revision: write NAME@REVISION.")
    return name, revision if separator else None
