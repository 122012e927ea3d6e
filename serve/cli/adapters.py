"""The commands that change and show the adapters of a running server."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from convert.artifact import Artifact
from convert.errors import ConvertError
from serve.adapters.ingest import candidate_of
from serve.cli.command import expand_options
from serve.cli.console import (
    err,
    new_table,
    print_change,
    print_json,
    print_line,
    print_promotion,
    print_rows,
    print_table,
    reported_errors,
)
from serve.cli.exporter import exporter_of_own
from serve.cli.options import AdapterName, AnyRevision, ChangeOptions, OneRevision, QueryOptions, ServerOptions
from serve.cli.pools import add_missing_pool
from serve.errors import ServeError
from serve.follower import desired_state
from serve.follower.admin_client import AdminClient
from serve.follower.desired_state import Step
from serve.follower.file_watch import FileWatcher, watch_in_thread

_AUTHOR_AND_REASON = "by, reason"
_REVISIONS = ("current", "previous", "staged", "pinned")


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


@expand_options
def publish(
    options: ChangeOptions,
    artifact: Annotated[Path, typer.Argument(help="An artifact with an adapter for the base that is served.")],
    name: Annotated[str | None, typer.Option(help="Publish under this name; default: the artifact's own.")] = None,
    stage_only: Annotated[
        bool, typer.Option("--stage-only", help="Load it everywhere as NAME@REVISION; the name moves with `promote`.")
    ] = False,
    create_pool: Annotated[
        bool,
        typer.Option(
            "--create-pool", help="If its base model isn't served, add a pool of it first. The artifact must hold it."
        ),
    ] = False,
) -> None:
    """Publish an adapter, or a new revision of one, to the running server.

    Every replica first loads the revision and verifies on its engine that it changes the answers of the base model, and
    that it gives the answers that were recorded when it was converted. Then the name points to the revision
    everywhere. Running requests finish on the revision that they began with. If one replica can't load or verify the
    revision, nothing changes.
    """
    with reported_errors():
        candidate_of(Artifact.open(artifact), name)  # reported before a server is looked for
        client = options.client()
        if create_pool:
            add_missing_pool(client, artifact, options.reason)
        answer = client.publish(artifact, name, stage_only=stage_only, reason=options.reason)
    if stage_only:
        print_change(answer, options.as_json, "[bold]{revision}[/] is staged {on_replicas} ({staged_s} s).")
    else:
        print_promotion(answer, options.as_json)


@expand_options
def promote(options: ChangeOptions, adapter: OneRevision) -> None:
    """Point a name to a revision that is staged, or that served before."""
    with reported_errors():
        answer = options.client().change("promote", *_name_and_revision(adapter, required=True), options.reason)
    print_promotion(answer, options.as_json)


@expand_options
def rollback(
    options: ChangeOptions,
    name: AdapterName,
    to: Annotated[str | None, typer.Option("--to", help="REVISION to go back to; default: the one before.")] = None,
) -> None:
    """Point a name back to its previous revision. That revision is still resident, so nothing is loaded.

    A second rollback goes back one more revision. It never returns to a revision that was rolled back from.
    """
    with reported_errors():
        revision = _digest(to) if to else None
        print_promotion(options.client().roll_back(name, revision, options.reason), options.as_json)


@expand_options
def abandon(options: ChangeOptions, adapter: OneRevision) -> None:
    """Give up a staged revision: every replica unloads it."""
    with reported_errors():
        answer = options.client().change("abandon", *_name_and_revision(adapter, required=True), options.reason)
        print_change(answer, options.as_json, f"[bold]{adapter}[/] is given up.")


@expand_options
def retire(options: ChangeOptions, name: AdapterName) -> None:
    """Take an adapter away from the running server.

    New requests for it get a 404, running ones finish. Publishing it, or giving it to `run`, brings it back.
    """
    with reported_errors():
        answer = options.client().retire(name, options.reason)
        print_change(answer, options.as_json, "[bold]{model}[/] is retired {on_replicas}.")


@expand_options
def pin(options: ChangeOptions, adapter: AnyRevision) -> None:
    """Keep a revision resident on every replica; it is not retired until it is unpinned."""
    with reported_errors():
        answer = options.client().change("pin", *_name_and_revision(adapter), options.reason)
        print_change(answer, options.as_json, "[bold]{revision}[/] is pinned.")


@expand_options
def unpin(options: ChangeOptions, adapter: AnyRevision) -> None:
    """Let a pinned revision come and go with its use again."""
    with reported_errors():
        answer = options.client().change("unpin", *_name_and_revision(adapter), options.reason)
        print_change(answer, options.as_json, "[bold]{revision}[/] is no longer pinned.")


@expand_options
def list_adapters(options: QueryOptions) -> None:
    """Show every adapter with its current and previous revision, and those that are staged or pinned."""
    with reported_errors():
        adapters = options.client().adapters()
    print_rows(
        [_with_short_revisions(adapter) for adapter in adapters],
        ("name", *_REVISIONS),
        options.as_json,
        {"adapters": adapters},
    )


@expand_options
def show(options: QueryOptions, name: AdapterName) -> None:
    """Show all revisions of an adapter: state, reason, author, and where each came from (with --json)."""
    with reported_errors():
        adapter = options.client().show(name)
    rows = [_with_author_and_reason(revision) for revision in adapter["revisions"]]
    print_rows(rows, ("revision", "state", "pinned", "at", _AUTHOR_AND_REASON), options.as_json, adapter)


@expand_options
def history(
    options: QueryOptions,
    name: Annotated[str | None, typer.Argument(help="Changes of this adapter only; default: of all.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="At most so many entries, the newest.")] = 50,
) -> None:
    """Show the changes of one adapter or of all: what was done, by whom, when and why; newest first."""
    with reported_errors():
        entries = options.client().history(name, limit)
    rows = [_with_author_and_reason(entry) for entry in entries]
    print_rows(rows, ("epoch", "at", "verb", "revision", _AUTHOR_AND_REASON), options.as_json, {"history": entries})


@expand_options
def apply(
    options: QueryOptions,
    file: Annotated[Path, typer.Argument(help="adapters.yaml: the adapters and pools that the server should have.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done, and do nothing.")] = False,
) -> None:
    """Make the running server serve the adapters and pools that a file lists. A second run on it changes nothing."""
    with reported_errors():
        wanted = desired_state.DesiredState.read(file)
        client = options.client()
        steps = desired_state.steps_to(wanted, client)
        failed = {} if dry_run else desired_state.apply(wanted, steps, client)
    if options.as_json:
        failures = [{"step": str(step), "code": error.code, "message": str(error)} for step, error in failed.items()]
        print_json({"steps": [str(step) for step in steps], "applied": not dry_run, "failed": failures})
    else:
        _print_steps([step for step in steps if step not in failed], failed, "would " if dry_run else "")
    if failed:
        raise typer.Exit(1)


def _print_steps(steps: Sequence[Step], failed: Mapping[Step, ServeError | ConvertError], prefix: str) -> None:
    for step in steps:
        print_line(f"{prefix}{step}")
    for step, error in failed.items():
        print_line(f"error[{error.code}]: {step}: {error}")
    if not steps and not failed:
        err.print("Nothing to change.")


@expand_options
def follow(
    options: ServerOptions,
    file: Annotated[Path, typer.Argument(help="adapters.yaml: the adapters and pools that the server should have.")],
    metrics_host: Annotated[str, typer.Option(help="Address of the metrics; 0.0.0.0 for all.")] = "127.0.0.1",
    metrics_port: Annotated[
        int,
        typer.Option(min=0, max=65535, help="Port of the metrics, which tell whether the file was applied; 0: none."),
    ] = 0,
) -> None:
    """Apply a file to the running server now, and again whenever it changes, until Ctrl-C or SIGTERM.

    A rollback that someone makes by hand stays until the content of the file changes.
    """
    with reported_errors():
        directory = options.state_dir()
        directory.prepare()
        client = AdminClient.of(directory, options.url)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with (
        contextlib.suppress(KeyboardInterrupt),
        reported_errors(),
        exporter_of_own(metrics_host, metrics_port) as metrics,
        watch_in_thread(FileWatcher(file, client, print_line, metrics)),
    ):
        signal.pause()


@expand_options
def status(options: QueryOptions) -> None:
    """Show for every replica of the running server what it holds, what it failed to load, and what it repaired."""
    with reported_errors():
        client = options.client()
        replicas = client.replicas()
    if options.as_json:
        print_json({"replicas": replicas, "url": client.url})
        return
    several = len({replica.get("pool") for replica in replicas}) > 1
    base_model = ["base model"] if several else []
    table = new_table("replica", *base_model, "epoch", "running requests", "adapters in the engine")
    for replica in replicas:
        pool, resident = [replica["pool"]] if several else [], "\n".join(replica["resident"])
        table.add_row(replica["replica"], *pool, str(replica["epoch"]), str(replica["running_requests"]), resident)
    print_table(table, client.url)
    for replica in replicas:
        for model, reason in replica["failures"].items():
            print_line(f"{replica['replica']} could not load {model}: {reason}")
        for repair in replica["repairs"]:
            print_line(f"{replica['replica']} repaired its engine: {repair}")


def _with_author_and_reason(row: dict[str, Any]) -> dict[str, Any]:
    """A row of `show` or `history` with author and reason in one column: otherwise a revision would be broken on a
    terminal of 80 columns."""
    return {**row, _AUTHOR_AND_REASON: [row["by"], *([row["reason"]] if row["reason"] else [])]}


def _with_short_revisions(adapter: dict[str, Any]) -> dict[str, Any]:
    """A row of `list`: revisions without the name, which is in the first column."""
    return {
        column: [_digest(revision) for revision in value] if isinstance(value, list) else _digest(value or "")
        for column, value in adapter.items()
    }


def _digest(revision: str) -> str:
    return revision.rpartition("@")[2]


def _name_and_revision(adapter: str, *, required: bool = False) -> tuple[str, str | None]:
    name, separator, revision = adapter.partition("@")
    if required and not revision:
        raise typer.BadParameter(f"{adapter!r} names no revision: write NAME@REVISION.")
    return name, revision if separator else None
