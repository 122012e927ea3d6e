"""The commands that make, list, rotate and revoke the keys of callers."""

from __future__ import annotations

import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import typer

from serve import key_writing
from serve.commands import DEFAULT_STATE, AsJson, LocalOption, StateOption
from serve.keys import Allowance, Key, KeyFile, Secret
from serve.output import err, print_json, table, told_errors
from serve.state import StateDir

KeyName = Annotated[str, typer.Argument(metavar="ID", help="What the key is called; usage and history name it.")]
FileOption = Annotated[
    Path | None, typer.Option("--keys-file", help="The file of keys; default: keys.json in the state directory.")
]
Amount = Annotated[int | None, typer.Option(min=1)]

_SHOWN_ONCE = "This is the only time that the key is shown; the file holds its SHA-256."


def add_to(app: typer.Typer) -> None:
    """Make `key` a command of `app`."""
    group = typer.Typer(help="Keys of callers. A running server follows the file.", no_args_is_help=True)
    for name, command in (("create", create), ("list", list_keys), ("rotate", rotate), ("revoke", revoke)):
        group.command(name)(command)
    app.add_typer(group, name="key")


def create(
    key_id: KeyName,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="A name of a model or adapter that it may use, * and ? as in a shell. Repeatable; default: all."
        ),
    ] = None,
    admin: Annotated[bool, typer.Option("--admin", help="It may use the admin API.")] = False,
    expires_in_days: Annotated[float | None, typer.Option(min=0, help="Default: never.")] = None,
    requests_per_minute: Amount = None,
    tokens_per_minute: Annotated[int | None, typer.Option(min=1, help="Prompt and completion together.")] = None,
    concurrent_requests: Amount = None,
    keys_file: FileOption = None,
    state: StateOption = DEFAULT_STATE,
    local: LocalOption = None,
    as_json: AsJson = False,
) -> None:
    """Make a key and print it, once."""

    def make(secrets: tuple[Secret, ...]) -> Key:
        return Key(
            id=key_id,
            secrets=secrets,
            models=tuple(model or ("*",)),
            admin=admin,
            expires=None if expires_in_days is None else datetime.now(UTC) + timedelta(days=expires_in_days),
            limits=Allowance(
                requests_per_minute=requests_per_minute,
                tokens_per_minute=tokens_per_minute,
                concurrent_requests=concurrent_requests,
            ),
        )

    with told_errors():
        secret = key_writing.create(_file(keys_file, state, local), make)
    _tell(key_id, secret, as_json)


def rotate(
    key_id: KeyName,
    grace_minutes: Annotated[float, typer.Option(min=0, help="The key before stays good for this long.")] = 60,
    keys_file: FileOption = None,
    state: StateOption = DEFAULT_STATE,
    local: LocalOption = None,
    as_json: AsJson = False,
) -> None:
    """Give a key a new secret and print it, once. Id, models, limits and usage stay."""
    with told_errors():
        secret = key_writing.rotate(_file(keys_file, state, local), key_id, timedelta(minutes=grace_minutes))
    _tell(key_id, secret, as_json)


def revoke(
    key_id: KeyName,
    keys_file: FileOption = None,
    state: StateOption = DEFAULT_STATE,
    local: LocalOption = None,
    as_json: AsJson = False,
) -> None:
    """Take a key away: new requests with it get a 401 within a second, running ones finish."""
    with told_errors():
        key_writing.revoke(_file(keys_file, state, local), key_id)
    if as_json:
        print_json({"id": key_id, "revoked": True})
    else:
        err.print(f"[bold]{key_id}[/] is revoked.")


def list_keys(
    keys_file: FileOption = None, state: StateOption = DEFAULT_STATE, local: LocalOption = None, as_json: AsJson = False
) -> None:
    """Every key with what it may do; never the key itself."""
    with told_errors():
        path = _file(keys_file, state, local)
        keys = KeyFile.read(path).keys if path.exists() else ()
    rows = [_row(key) for key in keys]
    table(rows, ("id", "models", "admin", "expires", "limits", "limits_per_model"), as_json, {"keys": rows})


def _file(keys_file: Path | None, state: str, local: Path | None) -> Path:
    return keys_file or StateDir(state, local).keys_file


def _row(key: Key) -> dict[str, Any]:
    return {
        "id": key.id,
        "models": list(key.models),
        "admin": key.admin,
        "expires": key.expires.isoformat(timespec="seconds") if key.expires else None,
        "limits": key.limits.model_dump(exclude_none=True),
        "limits_per_model": {name: it.model_dump(exclude_none=True) for name, it in key.limits_per_model.items()},
    }


def _tell(key_id: str, secret: str, as_json: bool) -> None:
    """The key alone on standard output, so that it can be piped where it belongs."""
    if as_json:
        print_json({"id": key_id, "key": secret})
        return
    err.print(_SHOWN_ONCE)
    sys.stdout.write(secret + "\n")
