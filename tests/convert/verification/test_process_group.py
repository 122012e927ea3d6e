"""An engine that is started for a verification, and whatever it starts, end with who started it."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from convert.verification.engine import guarded

# A leader with a child of its own: both write their process id; the child ignores polite requests.
FAMILY = """
import os, signal, sys, time
if os.fork() == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    open(sys.argv[1] + "/child", "w").write(str(os.getpid()))
else:
    open(sys.argv[1] + "/leader", "w").write(str(os.getpid()))
time.sleep(60)
"""


def family(directory: Path) -> tuple[int, int]:
    """The ids of the leader and its child, when both are there."""
    return read_id(directory / "leader"), read_id(directory / "child")


def read_id(path: Path) -> int:
    wait_until(lambda: path.exists() and path.read_text() != "")
    return int(path.read_text())


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # the latter if it ends between open and read
        return False


def wait_until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_nothing_of_a_process_group_outlives_the_block(tmp_path: Path) -> None:
    with guarded([sys.executable, "-c", FAMILY, str(tmp_path)], tmp_path, subprocess.DEVNULL):
        leader, child = family(tmp_path)
        assert is_alive(leader)
        assert is_alive(child)

    assert not is_alive(leader)
    assert not is_alive(child)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_of_a_process_group_outlives_its_killed_owner(tmp_path: Path, number: signal.Signals) -> None:
    owner = textwrap.dedent(f"""
        import subprocess, sys, time
        from pathlib import Path
        from convert.verification.engine import guarded
        here = {str(tmp_path)!r}
        with guarded([sys.executable, "-c", {FAMILY!r}, here], Path(here), subprocess.DEVNULL):
            time.sleep(60)
    """)
    process = subprocess.Popen([sys.executable, "-c", owner])
    leader, child = family(tmp_path)
    process.send_signal(number)
    process.wait()

    wait_until(lambda: not is_alive(leader) and not is_alive(child))


def test_the_guard_returns_how_its_command_ended(tmp_path: Path) -> None:
    with guarded([sys.executable, "-c", "raise SystemExit(7)"], tmp_path, subprocess.DEVNULL) as process:
        assert process.wait() == 7
