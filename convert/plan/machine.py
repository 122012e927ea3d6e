"""What this machine has free for a conversion: memory, also where a container limits it, and disk."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from convert.artifact.control_groups import VERSIONS, memory_of
from convert.errors import ConvertError, MemoryShort, OutputUnwritable
from convert.plan.phases import Estimate, Phase

# Header and manifest of a few hundred modules, with room to spare.
_SMALL_FILES_BYTES = 4 << 20
# An estimate may be so much too high: nothing is refused that may fit.
_TOLERANCE = 1.25


@dataclass(frozen=True)
class FreeMemory:
    """`nbytes`: that this process may take besides what it has. `limit`: what bounds it, in words."""

    nbytes: int
    limit: str


def free_memory(root: Path = Path("/")) -> FreeMemory | None:
    """None where the system doesn't say it. `root`: the directory that holds proc/ and sys/."""
    try:
        system = _fields(root / "proc/meminfo", unit=1024)
        free = [FreeMemory(system["MemAvailable"] + system["SwapFree"], "this machine")]
    except (OSError, KeyError):
        return None
    free += [FreeMemory(nbytes, "the cgroup of this container or job") for nbytes in _free_in_cgroups(root)]
    return min(free, key=lambda each: each.nbytes)


def resident_bytes() -> int:
    """The memory that this process has already; 0 where the system doesn't say it."""
    try:
        return _fields(Path("/proc/self/status"), unit=1024)["VmRSS"]
    except (OSError, KeyError):
        return 0


def require_room(needed_bytes: int, destination: Path) -> None:
    """Raises OutputUnwritable when the destination's disk can't hold that much."""
    parent = next(path for path in destination.absolute().parents if path.exists())
    free, needed = shutil.disk_usage(parent).free, needed_bytes + _SMALL_FILES_BYTES
    if needed > free:
        raise OutputUnwritable(
            f"{parent} has {free / 1e9:.2f} GB free, the output needs {needed / 1e9:.2f} GB. "
            "Free some, or choose another --out."
        )


def require_memory(phases: Sequence[Phase], tolerance: float = 1.0) -> None:
    """Raises MemoryShort for the phase that needs most, where it needs more than `tolerance` times what is free."""
    phase, free = max(phases, key=lambda each: each.memory_bytes), free_memory()
    if free is None:
        return
    available = free.nbytes + resident_bytes()
    if phase.memory_bytes > tolerance * available:
        raise MemoryShort(
            f"{phase.name} needs about {phase.memory_bytes / 1e9:.2f} GB of memory, and {free.limit} has "
            f"{available / 1e9:.2f} GB for it. {phase.remedy}"
        )


def require_resources(estimate: Estimate, destination: Path, reusable_bytes: int = 0) -> None:
    """Raises MemoryShort or OutputUnwritable where a phase needs clearly more than is free, before anything is written.

    `reusable_bytes`: of files at the destination that an interrupted run has left.
    """
    require_memory(estimate.phases, _TOLERANCE)
    require_room(max(estimate.disk_bytes - reusable_bytes, 0), destination)
    _require_temporary_room(estimate)


def shortages(estimate: Estimate, destination: Path) -> tuple[str, ...]:
    """The messages of `require_resources`, all of them."""
    checks: tuple[Callable[[], None], ...] = (
        lambda: require_memory(estimate.phases),
        lambda: require_room(estimate.disk_bytes, destination),
        lambda: _require_temporary_room(estimate),
    )
    messages = []
    for check in checks:
        try:
            check()
        except ConvertError as error:
            messages.append(str(error))
    return tuple(messages)


def _require_temporary_room(estimate: Estimate) -> None:
    folder = Path(tempfile.gettempdir())
    free = shutil.disk_usage(folder).free
    if estimate.temporary_bytes > free:
        raise OutputUnwritable(
            f"{folder} has {free / 1e9:.2f} GB free, measuring needs {estimate.temporary_bytes / 1e9:.2f} GB there. "
            "Free some, set TMPDIR to a larger disk, or measure on fewer rows."
        )


def _free_in_cgroups(root: Path) -> Iterator[int]:
    """What is left of every limit on this process's cgroup and on those that hold it."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        directory, *files = VERSIONS[bool(controllers)]
        mount = root / directory
        own = mount / path.lstrip("/")
        # In a container the path may be that outside of it, while the mount shows only what is inside.
        for folder in (own, *own.parents) if own.is_dir() else (mount,):
            if folder.is_relative_to(mount) and (memory := memory_of(folder, *files)):
                yield memory.left


def _fields(path: Path, *, unit: int = 1) -> dict[str, int]:
    """The numbers of a file with a name and a number in each line."""
    lines = re.findall(r"^(\w+):?\s+(\d+)", path.read_text(), re.MULTILINE)
    return {name: unit * int(number) for name, number in lines}
