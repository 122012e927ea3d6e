"""Where the catalogue is kept: small objects under keys, each created once and never changed.

There are two implementations: files in a directory (here), and an object store of a cloud
(`serve.catalogue.storage.bucket_store`).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from serve.catalogue.storage.atomic_files import create_file
from serve.errors import StoreUnavailable


class ObjectStore(Protocol):
    """Every method raises StoreUnavailable if the store can't be reached or is full."""

    def create(self, key: str, content: bytes) -> bool:
        """Create the object if the key is unused; whether it was created. It is durable when this returns. Of several
        writers at once one succeeds, and no reader ever sees a part of an object."""
        ...

    def read(self, key: str) -> bytes | None:
        """The object; None if there is none."""
        ...

    def names(self, prefix: str, after: str = "") -> list[str]:
        """The names of the objects directly under `prefix/`, sorted, without the prefix: those that sort after
        `after`."""
        ...

    def delete(self, key: str) -> None:
        """Remove the object, if it exists."""
        ...

    def locate(self, key: str) -> str:
        """The path or URL of the object, for messages."""
        ...


class DirectoryStore:
    """`ObjectStore` in a directory: the key of an object is the path of its file."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def create(self, key: str, content: bytes) -> bool:
        path = self._root / key
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return create_file(path, content)
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

    def names(self, prefix: str, after: str = "") -> list[str]:
        try:
            entries = os.scandir(self._root / prefix)
            return sorted(entry.name for entry in entries if entry.name > after and not entry.name.startswith("."))
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
