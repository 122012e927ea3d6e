"""How much memory a process has, as Linux tells it in /proc/PID/status."""

from __future__ import annotations

from pathlib import Path


def resident_bytes(line: str, process: int | str = "self") -> int:
    """Its resident set: VmRSS now, VmHWM its peak. (getrusage's peak includes that of the parent.)"""
    status = Path(f"/proc/{process}/status").read_text()
    return 1024 * int(status.partition(f"{line}:")[2].split()[0])
