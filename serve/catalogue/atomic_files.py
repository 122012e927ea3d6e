"""Files that are written whole or not at all, and are durable when the function returns.

The content goes into a temporary file of the same directory, is synced, and gets its name by one atomic call: `link` or
`rename`. A process that is killed leaves either state of the named file, and perhaps a temporary file, whose name
begins with a dot. New files are readable by their owner only. Every function raises OSError.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from convert.artifact.durable_files import sync


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
