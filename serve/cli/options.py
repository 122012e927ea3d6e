"""Options and arguments that several commands share, each declared once.

A command takes one of the models below as its first parameter; `serve.cli.command.expand_options` makes an option of
each field.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from pydantic import BaseModel, ConfigDict

from serve.catalogue.state_dir import StateDir
from serve.follower.admin_client import TOKEN_VARIABLE, AdminClient

DEFAULT_STATE = "graft-state"

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
AdapterName = Annotated[str, typer.Argument(metavar="NAME", help="The adapter's name, as clients write it.")]
AnyRevision = Annotated[
    str, typer.Argument(metavar="NAME[@REVISION]", help="A revision of an adapter; without @, the current one.")
]
OneRevision = Annotated[str, typer.Argument(metavar="NAME@REVISION", help="As `show` and `history` print it.")]


class StateOptions(BaseModel):
    """Where a server of this machine keeps its state."""

    model_config = ConfigDict(frozen=True)

    state: Annotated[
        str,
        typer.Option(
            help="Where the catalogue and the adapters live: a directory, or s3://, gs:// or az://BUCKET/PREFIX."
        ),
    ] = DEFAULT_STATE
    local: Annotated[
        Path | None, typer.Option(help="With an object store: the directory of this machine's own files.")
    ] = None

    def state_dir(self) -> StateDir:
        """Raises StateInvalid."""
        return StateDir(self.state, self.local)


class ServerOptions(StateOptions):
    """Which running server a command talks to."""

    url: Annotated[str | None, typer.Option(help=f"A server on another machine; its token in {TOKEN_VARIABLE}.")] = None

    def client(self) -> AdminClient:
        """The admin API of that server. Raises ServerNotRunning or StateInvalid."""
        return AdminClient.of(self.state_dir(), self.url)


class QueryOptions(ServerOptions):
    """The options of a command that shows something of a running server."""

    as_json: AsJson = False


class _ReasonOption(BaseModel):
    reason: Annotated[str, typer.Option(help="Reason for the change, which the history shows.")] = ""


class ChangeOptions(QueryOptions, _ReasonOption):
    """The options of a command that changes what a running server serves.

    `--help` lists the options of the last base class first.
    """
