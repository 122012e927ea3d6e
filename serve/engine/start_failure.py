"""Why vLLM did not start, and whether another attempt can end otherwise.

The engine is a process of its own, whose exception the caller does not get: vLLM says only "See root cause above". The
cause is on the standard error stream, which Ray redirects to a file for each of its processes, and a child inherits.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from serve.errors import EngineRefused, EngineStartFailed

_STDERR = 2
_TRACEBACK = "Traceback (most recent call last):"
# The beginning of a line in vLLM's log: "(EngineCore pid=1) ERROR 11-24 06:08:30 [core.py:1512] ".
_PREFIX = re.compile(r"^(?:\([^)]*\) )?(?:ERROR \S+ \S+ \[[^]]*\] )?")
# Errors that only refer to another line of the log.
_CONSEQUENCES = ("See root cause above", "EngineCore encountered an issue")
# Exceptions by which vLLM refuses a model, an argument or a value: it refuses the same the next time.
_LASTING = frozenset({
    "AssertionError", "AttributeError", "ImportError", "KeyError", "ModuleNotFoundError", "NotImplementedError",
    "TypeError", "ValidationError", "ValueError",
})  # fmt: skip
# A ValueError too, and it passes when a process that is just ending has released its memory.
_MAY_PASS = re.compile(r"free memory", re.IGNORECASE)


@contextmanager
def refusals() -> Iterator[None]:
    """Raises every exception of the block, in which vLLM checks what it is given, as EngineRefused with its reason."""
    try:
        yield
    except EngineStartFailed:
        raise
    except Exception as error:
        raise EngineRefused(_message(str(error) or repr(error))) from error


@contextmanager
def engine_failures() -> Iterator[None]:
    """Raises every exception of the block, in which the engine's process starts, as EngineRefused if another attempt
    would end the same, else as EngineStartFailed; with the cause that the process printed."""
    position = _printed_bytes()
    try:
        yield
    except EngineStartFailed:
        raise
    except Exception as error:
        cause = f"{type(error).__name__}: {error}"
        if any(text in cause for text in _CONSEQUENCES):
            cause = printed_cause(_printed_since(position)) or cause
        raise (EngineRefused if _is_lasting(cause) else EngineStartFailed)(_message(cause)) from error


def printed_cause(output: str) -> str | None:
    """The last line of the last traceback in the output that is no mere consequence of another one."""
    lines = iter(_PREFIX.sub("", line) for line in output.splitlines())
    cause = None
    for line in lines:
        if line == _TRACEBACK:
            end = next((line for line in lines if line and not line[0].isspace()), "")
            if end and not any(text in end for text in _CONSEQUENCES):
                cause = end
    return cause


def _is_lasting(cause: str) -> bool:
    name = cause.partition(":")[0].rpartition(".")[2]
    return name in _LASTING and not _MAY_PASS.search(cause)


def _message(cause: str) -> str:
    return f"vLLM can't serve this: {' '.join(cause.split())}"


def _printed_bytes() -> int | None:
    """The size of the file behind the standard error stream; None if there is no file behind it."""
    try:
        status = os.fstat(_STDERR)
    except OSError:
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _printed_since(position: int | None) -> str:
    if position is None:
        return ""
    with open(f"/proc/self/fd/{_STDERR}", "rb") as file:  # noqa: PTH123  (no path, but the open file itself)
        file.seek(position)
        return file.read().decode(errors="replace")
