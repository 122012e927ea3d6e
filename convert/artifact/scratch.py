"""Directories for files that nobody keeps. What a killed process left of its own is removed by the next one."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

_PREFIX = "graft-scratch-"
_LOCK = ".lock"
# A directory that is younger may not be locked yet by the process that makes it.
_MIN_AGE_S = 60.0


@contextlib.contextmanager
def scratch_directory(parent: Path | None = None) -> Iterator[Path]:
    """A new directory, which is removed with the block. `parent`: where; None for the system's temporary directory.

    Abandoned ones beside it are removed first. A lock that ends with its process tells which are abandoned, since
    process ids mean nothing where containers share the directory.
    """
    parent = parent or Path(tempfile.gettempdir())
    _remove_abandoned(parent)
    with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=parent) as name:
        directory = Path(name)
        with (directory / _LOCK).open("w") as lock:
            with contextlib.suppress(OSError):  # some file systems have no locks: nothing abandoned is removed there
                fcntl.flock(lock, fcntl.LOCK_EX)
            files = directory / "files"
            files.mkdir()
            yield files


def _remove_abandoned(parent: Path) -> None:
    for path in parent.glob(f"{_PREFIX}*"):
        # OSError: another process removes it, or uses it.
        with contextlib.suppress(OSError):
            status = path.lstat()
            if status.st_uid == os.geteuid() and time.time() - status.st_mtime > _MIN_AGE_S:
                _remove_if_unlocked(path)


def _remove_if_unlocked(path: Path) -> None:
    """Raises OSError where a process holds the lock."""
    with (path / _LOCK).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path)
