"""Memory of a process and processor time of the machine, as Linux counts them."""

from __future__ import annotations

from pathlib import Path

import psutil


def resident_bytes(line: str, process: int | str = "self") -> int:
    """The resident set of a process by /proc/PID/status: `VmRSS` is its size now, `VmHWM` its peak. getrusage is not
    used because its peak includes that of the parent."""
    status = Path(f"/proc/{process}/status").read_text()
    return 1024 * int(status.partition(f"{line}:")[2].split()[0])


def busy_seconds() -> float:
    """Processor time of all cores together in user and system mode since the machine started."""
    times = psutil.cpu_times()
    busy: float = times.user + times.nice + times.system
    return busy
