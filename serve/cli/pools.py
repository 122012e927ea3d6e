"""The commands that add pools to a running server, show them and remove them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel, ValidationError

from convert.artifact import Artifact, problems_of
from serve.cli.command import expand_options
from serve.cli.console import (
    StepProgress,
    counted,
    err,
    print_change,
    print_json,
    print_line,
    print_rows,
    reported_errors,
)
from serve.cli.options import AdapterName, ChangeOptions, QueryOptions
from serve.errors import PoolRefused
from serve.follower.admin_client import AdminClient
from serve.settings import PoolOptions

PoolName = Annotated[str, typer.Argument(metavar="NAME", help="The base model or merged model, as clients write it.")]

_COLUMNS = ("name", "kind", "state", "ready", "reason")


class _NewPoolFields(BaseModel):
    name: Annotated[
        str | None, typer.Option(help="What clients write as `model`; default: the artifact's own name.")
    ] = None
    replicas: Annotated[int, typer.Option(min=1, help="Engines, each with the whole model.")] = 1
    max_lora_rank: Annotated[
        int | None, typer.Option(min=0, help="Largest rank of its adapters; default: what they need now; 0: none.")
    ] = None
    max_active_adapters: Annotated[
        int | None, typer.Option(min=1, help="Different adapters that run at a time; default: that of the server.")
    ] = None
    max_resident_adapters: Annotated[
        int | None, typer.Option(min=1, help="Adapters that an engine keeps in memory; default: that of the server.")
    ] = None
    vllm_arg: Annotated[
        list[str] | None,
        typer.Option(help="An argument for vLLM, after those of the server, which it overrides. Repeatable."),
    ] = None
    sleep_after: Annotated[
        float | None,
        typer.Option(min=5, help="Seconds without a request after which its engines stop; the next one starts them."),
    ] = None
    wait: Annotated[bool, typer.Option(help="Return when its engines answer, or fail.")] = True


class NewPoolOptions(ChangeOptions, _NewPoolFields):
    """The options of `pool add`. `--help` lists the options of the last base class first."""

    def own(self) -> PoolOptions:
        """Raises PoolRefused for an argument that can't be passed to vLLM."""
        try:
            return PoolOptions(
                max_active_adapters=self.max_active_adapters,
                max_resident_adapters=self.max_resident_adapters,
                vllm_args=tuple(self.vllm_arg or ()),
                sleep_after_s=self.sleep_after,
            )
        except ValidationError as error:
            raise PoolRefused(f"The pool can't be added: {problems_of(error)}.") from error


def add_to(app: typer.Typer) -> None:
    """Make `pool` a command of `app`."""
    group = typer.Typer(
        help="Pools: the base models and merged models of a running server, each with engines of its own.",
        no_args_is_help=True,
    )
    for name, command in (("add", add), ("list", list_pools), ("remove", remove)):
        group.command(name)(command)
    app.add_typer(group, name="pool")
    app.command()(move)


@expand_options
def add(
    options: NewPoolOptions,
    artifact: Annotated[
        Path, typer.Argument(help="An artifact that holds its model, on the server's machine: merged, or 4-bit base.")
    ],
) -> None:
    """Serve one more base model or merged model, while everything else keeps answering.

    The server starts engines for it, and starts them again whenever it starts itself. They have the settings that
    `run` was given, where no option here overrides them. If the artifact has an adapter, that is published once the
    engines answer, unless --no-wait is given.
    """
    with reported_errors():
        client, root = options.client(), artifact.absolute()
        pool = client.add_pool(
            root, options.name, options.replicas, options.max_lora_rank, options.reason, options.own()
        )
        if options.wait:
            pool = _wait_until_ready(client, pool["name"])
            _publish_adapter(client, root, options.reason)
    if options.as_json:
        print_json(pool)
    elif pool["state"] == "running":
        err.print(f"[bold]{pool['name']}[/] answers ({counted(pool['ready'], 'engine')}).", soft_wrap=True)
    elif pool["state"] == "asleep":
        err.print(f"[bold]{pool['name']}[/] sleeps until a request comes.", soft_wrap=True)
    else:
        err.print(f"[bold]{pool['name']}[/] starts: see `python -m serve pool list`.", soft_wrap=True)


@expand_options
def list_pools(options: QueryOptions) -> None:
    """Show every pool: how many of its engines are ready, and why one is not."""
    with reported_errors():
        pools = options.client().pools()
    rows = [pool | {"ready": f"{pool['ready']} of {pool['replicas']}"} for pool in pools]
    print_rows(rows, _COLUMNS, options.as_json, {"pools": pools})


@expand_options
def remove(options: ChangeOptions, name: PoolName) -> None:
    """Stop serving a pool that was added. New requests for it get a 404, running ones may finish."""
    with reported_errors():
        answer = options.client().remove_pool(name, options.reason)
        print_change(answer, options.as_json, "[bold]{name}[/] stops.")


@expand_options
def move(
    options: ChangeOptions,
    name: AdapterName,
    pool: Annotated[str, typer.Argument(metavar="POOL", help="A pool that runs: see `pool list`.")],
) -> None:
    """Point an adapter's name to a pool: its merged model answers then, and callers change nothing.

    The adapter stays loaded, so `rollback` is as quick. A request is answered by one of the two as a whole.
    """
    with reported_errors():
        answer = options.client().move(name, pool, options.reason)
        print_change(answer, options.as_json, "[bold]{model}[/] is answered by the pool [bold]{pool}[/] {on_replicas}.")


def add_missing_pool(client: AdminClient, artifact: Path, reason: str) -> None:
    """Add a pool of the base model that an adapter's artifact is made for, unless there is one, and wait for its
    engines. Raises PoolRefused if they don't start, AdminRefused if the artifact does not hold its base model."""
    base = Artifact.open(artifact).manifest.model.fingerprint
    pool = next((pool for pool in client.pools() if pool["base"] == base), None)
    if pool is None:
        pool = client.add_pool(artifact, None, 1, None, reason)
    _wait_until_ready(client, pool["name"])


def _wait_until_ready(client: AdminClient, name: str) -> dict[str, Any]:
    progress = StepProgress()
    try:
        return client.wait_for_pool(name, progress.step)
    finally:
        progress.close()


def _publish_adapter(client: AdminClient, root: Path, reason: str) -> None:
    if root.is_dir() and Artifact.open(root).manifest.adapter is not None:
        published = client.publish(root, reason=reason)
        print_line(f"{published['model']} answers as {published['revision']}")
