"""Run a command that ends with the process that wanted it: `python guard.py COMMAND…`.

Its standard input is a pipe of which that process holds the other end, and sends nothing. When the pipe closes, and
the kernel closes it whatever way the process ends, the command gets SIGTERM; all that is left of its process group
after a grace gets SIGKILL. Exits with the command's status. It is run by its path, so that it needs nothing but the
standard library.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import NoReturn

_GRACE_S = 10


def run(command: Sequence[str]) -> int:
    """The command's exit status; negative: the signal that ended it."""
    signal.signal(signal.SIGTERM, _leave)
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)  # noqa: S603 (ours, no shell)
    try:
        ended = os.pidfd_open(child.pid)
        select.select([sys.stdin.fileno(), ended], [], [])
    finally:
        _stop(child)
    return child.returncode


def _stop(child: subprocess.Popen[bytes]) -> None:
    _kill(child.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(_GRACE_S)
    # The leader may have left others of its group behind.
    _kill(child.pid, signal.SIGKILL)
    child.wait()


def _kill(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def _leave(signum: int, frame: object) -> NoReturn:
    raise SystemExit(128 + signum)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
