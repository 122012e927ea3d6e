"""How much memory is left for this process: on the machine, or in its container if that has a limit which is nearer.

When none is left, the kernel ends a process, usually the one that uses most.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from convert.artifact.control_groups import VERSIONS, memory_of

_SHORT_SHARE = 0.05


@dataclass(frozen=True)
class Memory:
    """In bytes."""

    available: int
    limit: int

    @property
    def is_short(self) -> bool:
        """Whether less than 5 % are left, as the alert GraftMemoryShort has it."""
        return self.available < _SHORT_SHARE * self.limit


def memory_left(groups_root: Path = Path("/")) -> Memory:
    """`groups_root`: the root of the file system with the control groups."""
    return min(_machine_and_container(groups_root), key=lambda memory: memory.available)


def memory_limit_bytes(groups_root: Path = Path("/")) -> int:
    """The memory of the machine, or the limit of the container if it has one."""
    return min(memory.limit for memory in _machine_and_container(groups_root))


@dataclass
class MemoryWatch:
    """Warns once when memory gets short, and again only after twice as much was left."""

    _is_short: bool = False

    def warning(self, memory: Memory) -> str | None:
        """One line for the operator; None if there is nothing new to say."""
        if self._is_short:
            self._is_short = memory.available < 2 * _SHORT_SHARE * memory.limit
            return None
        self._is_short = memory.is_short
        if not memory.is_short:
            return None
        return (
            f"Warning: {gib(memory.available)} of {gib(memory.limit)} GiB of memory are left. {largest_process()} "
            "uses most. When none is left, the kernel ends such a process; an engine that it ends is started again."
        )


def largest_process() -> str:
    """The process of the machine that uses most memory, in words, without its arguments, which may hold secrets."""
    processes = (process.info for process in psutil.process_iter(["pid", "name", "memory_info"]))
    largest = max(processes, key=lambda info: info["memory_info"].rss if info["memory_info"] else 0)
    return f"Process {largest['pid']} ({largest['name']}, {gib(largest['memory_info'].rss)} GiB)"


def gib(count: int) -> str:
    return f"{count / 2**30:.1f}"


def _machine_and_container(groups_root: Path) -> list[Memory]:
    machine = psutil.virtual_memory()
    return [Memory(machine.available, machine.total), *_of_groups(groups_root, machine.total)]


def _of_groups(root: Path, machine_bytes: int) -> Iterator[Memory]:
    """Of the group that a container sees as its own."""
    for directory, *files in VERSIONS:
        group = memory_of(root / directory, *files)
        if group and group.limit < machine_bytes:
            yield Memory(group.left, group.limit)
