"""This machine's copies of adapters that a bucket holds: who uses which, and which are removed when they take too much.

    DIR/<revision>/                 a whole copy
    DIR/.incoming-<revision>-…/     one that is being written, or was when its process was killed; .damaged-… too
    DIR/.<revision>.used.lock       every use has a shared lock on it, and whoever removes the copy an exclusive one

So the other processes of a machine see a use, and the system ends it if its process dies. The time of the last use is
that of the file's last change.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
import threading
from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_NAME = re.compile(r"(\.(?:incoming|damaged)-)?([0-9a-f]{64})(?:-\w+)?")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Copy:
    path: Path
    revision: str
    bytes: int
    is_whole: bool
    used_at: float  # seconds since the epoch; 0 for never


class LocalCopies:
    """The copies in a directory, by the digest of their revision. Safe in threads and across processes."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._descriptors: dict[str, list[int]] = {}
        self._guard = threading.Lock()

    def begin_use(self, revision: str) -> None:
        """From now on the copy stays, and what is on its way to become it. Waits while somebody removes it, which is a
        matter of milliseconds. Raises OSError."""
        self._directory.mkdir(parents=True, exist_ok=True)
        descriptor = self._locked(revision, fcntl.LOCK_SH)
        os.utime(descriptor)
        with self._guard:
            self._descriptors.setdefault(revision, []).append(descriptor)

    def end_use(self, revision: str) -> None:
        """Never blocks."""
        with self._guard:
            descriptor = self._descriptors[revision].pop()
            if not self._descriptors[revision]:
                del self._descriptors[revision]
        os.close(descriptor)

    @contextmanager
    def use(self, revision: str) -> Iterator[None]:
        self.begin_use(revision)
        try:
            yield
        finally:
            self.end_use(revision)

    def remove_surplus(self, max_bytes: int, wanted: Set[str]) -> None:
        """Remove what a process that was killed has left. Then remove whole copies until the rest takes `max_bytes`:
        those that are not `wanted` first, each time the one that was not used for the longest time. What is in use
        stays, even if it takes more. Raises nothing: a copy too many stops no load."""
        try:
            copies = sorted(self._all(), key=lambda copy: (copy.is_whole, copy.revision in wanted, copy.used_at))
        except OSError:
            logger.warning("could not look for copies to remove in %s", self._directory, exc_info=True)
            return
        total = sum(copy.bytes for copy in copies)
        for copy in copies:
            if copy.is_whole and total <= max_bytes:
                return
            if self._remove_unused(copy):
                total -= copy.bytes
                logger.info("removed the copy of an adapter", extra={"event": "copy removed", "path": str(copy.path)})

    def _all(self) -> Iterator[_Copy]:
        for path in self._directory.iterdir():
            match = _NAME.fullmatch(path.name)
            if match and path.is_dir():
                size = sum(_size(file) for file in path.rglob("*"))
                yield _Copy(path, match[2], size, match[1] is None, _changed_at(self._lock_file(match[2])))

    def _remove_unused(self, copy: _Copy) -> bool:
        """Whether it is gone now."""
        try:
            descriptor = self._locked(copy.revision, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # it is in use
            return False
        try:
            shutil.rmtree(copy.path, ignore_errors=True)
            if not (self._directory / copy.revision).exists():
                self._lock_file(copy.revision).unlink(missing_ok=True)
        finally:
            os.close(descriptor)
        return not copy.path.exists()

    def _locked(self, revision: str, operation: int) -> int:
        """A descriptor with that lock, which goes with it."""
        path = self._lock_file(revision)
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, operation)
                if _is_at(descriptor, path):
                    return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)  # it was removed with its copy while this one waited

    def _lock_file(self, revision: str) -> Path:
        return self._directory / f".{revision}.used.lock"


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _size(file: Path) -> int:
    """0 for a file that is gone."""
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


def _changed_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
