"""The commands that make, list, rotate and revoke the keys of callers."""

from __future__ import annotations

import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel

from serve.callers import key_admin
from serve.callers.keys import Key, KeyFile, Secret
from serve.cli.command import expand_options
from serve.cli.console import err, print_json, print_rows, reported_errors
from serve.cli.options import AsJson, StateOptions
from serve.settings import Allowance

KeyName = Annotated[str, typer.Argument(metavar="ID", help="Id of the key, which usage and history show.")]
Amount = Annotated[int | None, typer.Option(min=1)]

_UNITS = {
    "requests_per_minute": "requests/min",
    "tokens_per_minute": "tokens/min",
    "concurrent_requests": "at a time",
}
_SHOWN_ONCE = "This is the only time that the key is shown; the file holds its SHA-256."


class _FileOption(BaseModel):
    keys_file: Annotated[
        Path | None, typer.Option(help="The file of keys; default: keys.json in the state directory.")
    ] = None


class KeysOptions(StateOptions, _FileOption):
    """Which file of keys a command reads and changes. `--help` lists the options of the last base class first."""

    as_json: AsJson = False

    def path(self) -> Path:
        """The file of keys. Raises StateInvalid."""
        return self.keys_file or self.state_dir().keys_file


class _NewKeyFields(BaseModel):
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="A name of a model or adapter that it may use, * and ? as in a shell. Repeatable; default: all."
        ),
    ] = None
    admin: Annotated[bool, typer.Option("--admin", help="It may use the admin API.")] = False
    expires_in_days: Annotated[float | None, typer.Option(min=0, help="Default: never.")] = None
    requests_per_minute: Amount = None
    tokens_per_minute: Annotated[int | None, typer.Option(min=1, help="Prompt and completion together.")] = None
    concurrent_requests: Amount = None


class NewKeyOptions(KeysOptions, _NewKeyFields):
    """The options of `key create`. `--help` lists the options of the last base class first."""

    def key(self, key_id: str, secrets: tuple[Secret, ...]) -> Key:
        """The new key. Raises ValidationError."""
        days = self.expires_in_days
        return Key(
            id=key_id,
            secrets=secrets,
            models=tuple(self.model or ("*",)),
            admin=self.admin,
            expires=None if days is None else datetime.now(UTC) + timedelta(days=days),
            limits=Allowance(**self.model_dump(include=set(Allowance.model_fields))),
        )


def add_to(app: typer.Typer) -> None:
    """Make `key` a command of `app`."""
    group = typer.Typer(help="Keys of callers. A running server follows the file.", no_args_is_help=True)
    for name, command in (("create", create), ("list", list_keys), ("rotate", rotate), ("revoke", revoke)):
        group.command(name)(command)
    app.add_typer(group, name="key")


@expand_options
def create(options: NewKeyOptions, key_id: KeyName) -> None:
    """Make a key and print it, once."""
    with reported_errors():
        secret = key_admin.create(options.path(), lambda secrets: options.key(key_id, secrets))
    _print_secret(key_id, secret, options.as_json)


@expand_options
def rotate(
    options: KeysOptions,
    key_id: KeyName,
    grace_minutes: Annotated[float, typer.Option(min=0, help="The previous secret stays valid for this long.")] = 60,
) -> None:
    """Give a key a new secret and print it, once. The key keeps its id, models, limits and usage."""
    with reported_errors():
        secret = key_admin.rotate(options.path(), key_id, timedelta(minutes=grace_minutes))
    _print_secret(key_id, secret, options.as_json)


@expand_options
def revoke(options: KeysOptions, key_id: KeyName) -> None:
    """Take a key away: new requests with it get a 401 within a second, running ones finish."""
    with reported_errors():
        key_admin.revoke(options.path(), key_id)
    if options.as_json:
        print_json({"id": key_id, "revoked": True})
    else:
        err.print(f"[bold]{key_id}[/] is revoked.")


@expand_options
def list_keys(options: KeysOptions) -> None:
    """Show every key with its rights and limits; never the secret itself."""
    with reported_errors():
        path = options.path()
        keys = KeyFile.read(path).keys if path.exists() else ()
    documents = [_document(key) for key in keys]
    rows = [document | {"limits": _limits(document)} for document in documents]
    print_rows(rows, ("id", "models", "admin", "expires", "limits"), options.as_json, {"keys": documents})


def _document(key: Key) -> dict[str, Any]:
    return {
        "id": key.id,
        "models": list(key.models),
        "admin": key.admin,
        "expires": key.expires.isoformat(timespec="seconds") if key.expires else None,
        "limits": key.limits.model_dump(exclude_none=True),
        "limits_per_model": {
            name: limits.model_dump(exclude_none=True) for name, limits in key.limits_per_model.items()
        },
    }


def _limits(document: dict[str, Any]) -> list[str]:
    """The limits of a key, then those of single models, one a line."""
    return [
        f"{model} {amount:,} {_UNITS[kind]}".lstrip()
        for model, limits in (("", document["limits"]), *document["limits_per_model"].items())
        for kind, amount in limits.items()
    ]


def _print_secret(key_id: str, secret: str, as_json: bool) -> None:
    """The key alone on standard output, so that it can be piped where it belongs."""
    if as_json:
        print_json({"id": key_id, "key": secret})
        return
    err.print(_SHOWN_ONCE)
    sys.stdout.write(secret + "\n")
