"""Numbers as people read them."""

from __future__ import annotations


def readable_bytes(count: int) -> str:
    """Decimal units, as disks are sold: 269.1 MB."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
