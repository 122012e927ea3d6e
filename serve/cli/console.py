"""How the command line writes: tables, JSON and keys on standard output, everything else on standard error."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, NoReturn

import typer
from pydantic import ValidationError
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from convert.artifact import problems_of
from convert.errors import ConvertError
from serve.errors import ServeError, StateInvalid


class _StandardError(Console):
    """Falls silent where nobody reads on: a server serves on when the pipe of its messages is closed."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


err = _StandardError(stderr=True)

# Column of a document → its title. Times are shown to the second, which leaves the others room on 80 columns.
_TIMES = {"at": "at (UTC)", "expires": "expires (UTC)"}
_TO_THE_SECOND = len("2026-01-31T23:59:59")
# Columns whose texts are broken into lines of this many characters before a name in another column is broken.
_TEXTS, _LEAST_TEXT = ("by, reason", "models", "limits"), 10
_GAP = 2  # between two columns


@contextmanager
def reported_errors() -> Iterator[None]:
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


def print_line(text: str) -> None:
    """As it is, on standard error: a command or a path in it can be copied, whatever the width of the terminal."""
    err.print(text, markup=False, highlight=False, soft_wrap=True)


class StepProgress:
    """Shows the step that a long command is at, with the time since its beginning: one line that changes on a terminal,
    a line for each step where there is none."""

    def __init__(self) -> None:
        self._began_s = time.monotonic()
        self._step = ""
        self._status = err.status("") if err.is_terminal else None

    def step(self, text: str) -> None:
        """The same step twice in a row is shown once."""
        elapsed_s = time.monotonic() - self._began_s
        if self._status:
            self._status.update(f"{text} … {elapsed_s:.0f} s")
            self._status.start()
        elif text != self._step:
            print_line(f"[{elapsed_s:5.1f} s] {text}")
        self._step = text

    def close(self) -> None:
        if self._status:
            self._status.stop()


def print_change(answer: Mapping[str, Any], as_json: bool, text: str) -> None:
    """Print the answer of the admin API: `text` with the answer's fields in it, or the answer as JSON. `{on_replicas}`
    stands for the number of replicas, in words."""
    if as_json:
        print_json(answer)
        return
    on_replicas = f"on {counted(answer['replicas'], 'replica')}" if "replicas" in answer else ""
    err.print(text.format(**answer, on_replicas=on_replicas), soft_wrap=True)


def print_promotion(answer: Mapping[str, Any], as_json: bool) -> None:
    print_change(
        answer,
        as_json,
        "[bold]{model}[/] now answers as [bold]{revision}[/] {on_replicas} "
        "(staged in {staged_s} s, switched in {promoted_s} s).",
    )


def counted(number: int, noun: str) -> str:
    """`1 replica`, `2 replicas`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def new_table(*titles: str) -> Table:
    """A table without lines between its cells, which leaves them room on 80 columns. Text that is too long for a
    column is broken, and never cut off."""
    table = Table(box=None, padding=(0, _GAP, 0, 0), pad_edge=False)
    for title in titles:
        table.add_column(title, overflow="fold")
    return table


def print_table(table: Table, title: str = "", console: Console | None = None) -> None:
    """On standard output, or on another console. The title is never wrapped: a URL in it can be copied."""
    console = console or Console()
    if title:
        console.print(title, markup=False, highlight=False, soft_wrap=True)
    console.print(table)


def print_rows(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[str], as_json: bool, document: Mapping[str, Any]
) -> None:
    """The `columns` of `rows` as a table, or the whole document as JSON."""
    if as_json:
        print_json(document)
        return
    table = new_table(*(_TIMES.get(column, column.replace("_", "\n")) for column in columns))
    cells = [[_cell(column, row[column]) for column in columns] for row in rows]
    names_fit = _names_fit(columns, cells)
    for column, shown in zip(columns, table.columns, strict=True):
        shown.no_wrap = column in _TIMES or (names_fit and column not in _TEXTS)
        if rows and all(type(row[column]) is int for row in rows):
            shown.justify = "right"
    for row_cells in cells:
        table.add_row(*row_cells)
    print_table(table)


def _names_fit(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> bool:
    """Whether the names of adapters and revisions need not be broken, if only the texts beside them are."""
    widths = [
        max(map(cell_len, chain(column.split("_"), *(row[index].splitlines() for row in cells))))
        for index, column in enumerate(columns)
    ]
    least = [
        min(width, _LEAST_TEXT) if column in _TEXTS else width for column, width in zip(columns, widths, strict=True)
    ]
    return sum(least) + _GAP * (len(columns) - 1) <= Console().width


def _cell(column: str, value: object) -> str:
    if isinstance(value, list):
        return "\n".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else ""
    if isinstance(value, str) and column in _TIMES:
        return value[:_TO_THE_SECOND].replace("T", " ")
    return "" if value is None else str(value)


def _fail(code: str, message: str) -> NoReturn:
    print_line(f"error[{code}]: {message}")
    raise typer.Exit(1)
