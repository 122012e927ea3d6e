"""The memory of control groups, by which the system limits containers and jobs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

# Of version 2, then of version 1: where the groups are mounted, and the files for the limit and the usage.
VERSIONS = (
    ("sys/fs/cgroup", "memory.max", "memory.current"),
    ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
)
# The cache of files counts as used, and is given up before a process is ended.
_CACHE = ("inactive_file", "active_file")


@dataclass(frozen=True)
class GroupMemory:
    """In bytes. `left`: besides what is used and can't be given up."""

    left: int
    limit: int


def memory_of(group: Path, limit_file: str, usage_file: str) -> GroupMemory | None:
    """None where the group has no limit, or can't be read. Version 1 says with a huge number that there is none."""
    try:
        limit = (group / limit_file).read_text().strip()
        used_bytes = int((group / usage_file).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        # Version 1 has the sums over a group and those below it under names of their own.
        cache_bytes = sum(int(stat.get(f"total_{name}", stat.get(name, 0))) for name in _CACHE)
    except (OSError, ValueError):
        return None
    return GroupMemory(max(0, int(limit) - used_bytes + cache_bytes), int(limit)) if limit.isdigit() else None
