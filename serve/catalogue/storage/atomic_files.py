"""Files that are written whole or not at all, and are durable when the function returns.

The content goes into a temporary file of the same directory, is synced, and gets its name by one atomic call: `link` or
`rename`. A process that is killed leaves either state of the named file, and perhaps a temporary file, whose name
begins with a dot. New files are readable by their owner only. Every function raises OSError.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from convert.artifact.durable_files import sync

# Writes the content of the file with this name to the stream.
Source = Callable[[str, BinaryIO], None]


def create_file(path: Path, content: bytes) -> bool:
    """Create `path` if it does not exist; whether it was created. Of several writers at once one succeeds."""
    with _temporary_file(path, content) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        sync(path.parent)
    return True


def replace_file(path: Path, content: bytes) -> None:
    """Create `path`, or replace the file that is there."""
    with _temporary_file(path, content) as temporary:
        temporary.replace(path)
    sync(path.parent)


@contextmanager
def _temporary_file(path: Path, content: bytes) -> Iterator[Path]:
    """A synced file with the content beside `path`; removed at the end, unless it was renamed."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def write_hashed(path: Path, name: str, source: Source) -> str:
    """Write the file `name` of `source` to `path`; returns the SHA-256 of its bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as stream:
        hashing = _HashingStream(stream)
        source(name, hashing)  # type: ignore[arg-type]  # a source calls nothing but write
        stream.flush()
        os.fsync(stream.fileno())
    return hashing.sha256.hexdigest()


class _HashingStream:
    """A stream that computes the SHA-256 of what is written to it."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        return self._stream.write(data)
