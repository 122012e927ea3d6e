"""SHA-256 of files, and one digest for a set of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path


def digest(files: Mapping[str, str]) -> str:
    """One SHA-256 for a set of files: of the lines `<sha256>  <path>\\n` in path order, as sha256sum prints them."""
    lines = "".join(f"{files[path]}  {path}\n" for path in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()


def file_digests(root: Path) -> dict[str, str]:
    """SHA-256 of every file below `root`, by path relative to it."""
    return {path.relative_to(root).as_posix(): file_sha256(path) for path in sorted(root.rglob("*")) if path.is_file()}


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def size_bytes(root: Path) -> int:
    """Bytes of all files below `root`."""
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
