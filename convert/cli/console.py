"""How the command line ends: error messages, exit statuses, JSON documents, SIGTERM."""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import typer

from convert.errors import ConvertError, FileInaccessible

_EXIT_STATUS = {"quality_gate_failed": 3, "artifact_invalid": 4, "verification_failed": 4}


@contextmanager
def reported_errors() -> Iterator[None]:
    """Prints a ConvertError as `error[code]: message` on standard error, and exits with the status of its code.

    So it does with the system's error for a file that has none of its own: no permission, a path that is too long, a
    broken disk.
    """
    try:
        yield
    except ConvertError as error:
        _exit_with(error)
    except OSError as error:
        if error.errno == errno.EPIPE:  # whoever read the output has gone
            raise
        file = f"{error.filename}: " if error.filename is not None else ""
        _exit_with(FileInaccessible(f"{file}{error.strerror}. Check the path, its permissions and its disk."))


def _exit_with(error: ConvertError) -> NoReturn:
    typer.echo(f"error[{error.code}]: {error}", err=True)
    raise typer.Exit(_EXIT_STATUS.get(error.code, 1)) from None


def print_json(document: dict[str, Any]) -> None:
    json.dump(document, sys.stdout, indent=2, ensure_ascii=False)
    sys.stdout.write("\n")


def exit_on_sigterm(signum: int, frame: object) -> NoReturn:
    """A signal handler that ends the process through the clean-up of everything that is open.

    Unlike after Ctrl-C, finished shards stay for the next run.
    """
    raise SystemExit(128 + signum)
