"""Scratch directories: gone after use, and after a process was killed that used one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from convert.artifact.scratch import scratch_directory

_HOLDS_ONE = """
import sys, time
from pathlib import Path
from convert.artifact.scratch import scratch_directory
with scratch_directory(Path(sys.argv[1])) as directory:
    (directory / "weights").write_bytes(b"x")
    print(directory, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process that uses a scratch directory, and the directory, which looks old."""
    with subprocess.Popen(
        [sys.executable, "-c", _HOLDS_ONE, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        directory = Path(process.stdout.readline().strip())
        _age(directory.parent)
        yield process, directory
        process.kill()


def test_nothing_is_left_of_a_scratch_directory_after_its_block(tmp_path: Path) -> None:
    with scratch_directory(tmp_path) as directory:
        (directory / "file").write_bytes(b"x")

    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_removed_by_the_next_one(
    holder: tuple[subprocess.Popen[str], Path], tmp_path: Path
) -> None:
    process, directory = holder
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (directory / "weights").exists()

    with scratch_directory(tmp_path):
        assert not directory.exists()


def test_the_scratch_directory_of_a_running_process_stays_however_old(
    holder: tuple[subprocess.Popen[str], Path], tmp_path: Path
) -> None:
    with scratch_directory(tmp_path):
        pass

    assert (holder[1] / "weights").read_bytes() == b"x"


def test_only_directories_of_this_name_are_removed_and_no_link_is_followed(tmp_path: Path) -> None:
    parent, victim = tmp_path / "parent", tmp_path / "victim"
    for directory in (parent / "graft-other", victim):
        directory.mkdir(parents=True)
        (directory / ".lock").touch()
        _age(directory)
    (parent / "graft-scratch-link").symlink_to(victim)
    os.utime(parent / "graft-scratch-link", (0, 0), follow_symlinks=False)

    with scratch_directory(parent):
        pass

    assert (parent / "graft-other").is_dir()
    assert (victim / ".lock").exists()


def _age(directory: Path) -> None:
    hour_ago = time.time() - 3600
    os.utime(directory, (hour_ago, hour_ago))
