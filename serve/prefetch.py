"""Bring an adapter's files into this machine's memory before the engine reads them."""

from __future__ import annotations

import os
from pathlib import Path


def read_ahead(directory: Path) -> None:
    """Ask the kernel to read the files of a directory into its page cache; returns without waiting for it."""
    for path in directory.iterdir():
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(descriptor)
