"""Where the catalogue is kept: small objects under keys, each created once and never changed.

Two places keep the same promises: a directory (here) and an object store (`serve.bucket`).
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path
from typing import Protocol

from serve.errors import StoreUnavailable


class Objects(Protocol):
    """Every method raises StoreUnavailable when the place can't be reached or is full."""

    def create(self, key: str, content: bytes) -> bool:
        """Write it whole if there is nothing under the key, else return False. Durable when it returns; of
        writers at once one wins, and no reader ever sees a part."""
        ...

    def read(self, key: str) -> bytes | None: ...

    def names(self, prefix: str) -> list[str]:
        """What lies directly under `prefix/`, sorted, without the prefix."""
        ...

    def delete(self, key: str) -> None:
        """Nothing happens if it isn't there."""
        ...

    def locate(self, key: str) -> str:
        """The key as a person can look it up."""
        ...


class Directory:
    """Objects as files. An entry is written under another name and then linked to its own, which fails if that
    is taken."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def create(self, key: str, content: bytes) -> bool:
        path = self._root / key
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return _link_new(path, content)
        except OSError as error:
            raise StoreUnavailable(
                f"Can't write {path}: {error.strerror}. Free space or grant access, then try again."
            ) from error

    def read(self, key: str) -> bytes | None:
        path = self._root / key
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StoreUnavailable(f"Can't read {path}: {error.strerror}.") from error

    def names(self, prefix: str) -> list[str]:
        try:
            return sorted(it.name for it in os.scandir(self._root / prefix) if not it.name.startswith("."))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StoreUnavailable(f"Can't list {self._root / prefix}: {error.strerror}.") from error

    def delete(self, key: str) -> None:
        try:
            (self._root / key).unlink(missing_ok=True)
        except OSError as error:
            raise StoreUnavailable(f"Can't remove {self._root / key}: {error.strerror}.") from error

    def locate(self, key: str) -> str:
        return str(self._root / key)


def _link_new(path: Path, content: bytes) -> bool:
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".entry-")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        fsync_directory(path.parent)
        return True
    finally:
        with contextlib.suppress(FileNotFoundError):
            Path(temporary).unlink()


def fsync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
