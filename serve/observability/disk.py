"""How much room is left on a disk."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Disk:
    """In bytes."""

    available: int
    size: int


def disk_of(directory: Path) -> Disk | None:
    """The disk that holds the directory; None if it can't be asked. May wait long for a volume of the network."""
    try:
        usage = shutil.disk_usage(directory)
    except OSError:
        return None
    return Disk(usage.free, usage.total)
