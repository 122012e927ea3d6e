"""Runs a command that ends with the process that started it: `python guard.py COMMAND…`.

Standard input is a pipe whose other end that process holds and never writes to. The kernel closes the pipe when the
process ends, in whatever way. Then the command gets SIGTERM, and after a grace period everything that is left of its
process group gets SIGKILL. The guard exits with the command's status. It is run by its path, so it imports only the
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
    """Run the command. Returns its exit status, or the negative number of the signal that ended it."""
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
    # Other processes of the group may still run.
    _kill(child.pid, signal.SIGKILL)
    child.wait()


def _kill(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def _leave(signum: int, frame: object) -> NoReturn:
    raise SystemExit(128 + signum)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
