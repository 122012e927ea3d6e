"""Files that are durable when the function returns: after a power cut they are there, with all of their bytes."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def create_file(path: Path, content: bytes) -> None:
    """Write a new file. If the process is killed meanwhile, a part of the file may remain. Raises FileExistsError."""
    with path.open("xb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def replace_file(path: Path, content: bytes) -> None:
    """Create or replace a file atomically: a reader sees the old content or the new.

    If the process is killed meanwhile, a temporary file may remain in the same directory; its name begins with a dot.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        create_file(temporary, content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Make the content of a file durable, or the names of the files in a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
