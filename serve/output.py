"""How the command line speaks: tables and JSON on standard output, everything else on standard error."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from convert.artifact import problems_of
from convert.errors import ConvertError
from serve.errors import ServeError, StateInvalid

err = Console(stderr=True)


@contextmanager
def told_errors() -> Iterator[None]:
    """Prints `error[code]: message` and exits with 1: a user's mistake never shows a traceback."""
    try:
        yield
    except (ServeError, ConvertError) as error:
        _fail(error.code, str(error))
    except ValidationError as error:
        _fail("invalid_settings", problems_of(error))
    except PermissionError as error:
        _fail(StateInvalid.code, str(error))


def print_json(document: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(document) + os.linesep)


def tell_moved(answer: Mapping[str, Any], as_json: bool) -> None:
    tell(
        answer,
        as_json,
        "[bold]{model}[/] now answers as [bold]{revision}[/] on {replicas} replicas "
        "(staged in {staged_s} s, switched in {promoted_s} s).",
    )


def tell(answer: Mapping[str, Any], as_json: bool, text: str) -> None:
    if as_json:
        print_json(answer)
    else:
        err.print(text.format(**answer))


def table(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[str], as_json: bool, document: Mapping[str, Any]
) -> None:
    if as_json:
        print_json(document)
        return
    shown = Table(*columns)
    for row in rows:
        shown.add_row(*(_cell(row[column]) for column in columns))
    Console().print(shown)


def _cell(value: object) -> str:
    if isinstance(value, list):
        return "\n".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else ""
    return "" if value is None else str(value)


def _fail(code: str, message: str) -> NoReturn:
    err.print(f"error[{code}]: {message}", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(1)
