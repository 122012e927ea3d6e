"""How much memory is free, by the files in which Linux says it."""

from __future__ import annotations

from pathlib import Path

import pytest

from convert.plan.machine import free_memory, resident_bytes

GIB = 1 << 30


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine with 8 GiB available and 1 GiB of swap, without a cgroup."""
    write(tmp_path / "proc/meminfo", f"MemTotal: {16 << 20} kB\nMemAvailable: {8 << 20} kB\nSwapFree: {1 << 20} kB\n")
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def limit(folder: Path, limit: object, used: int, cache: int) -> None:
    write(folder / "memory.max", f"{limit}\n")
    write(folder / "memory.current", f"{used}\n")
    write(folder / "memory.stat", f"anon 5\ninactive_file {cache // 2}\nactive_file {cache - cache // 2}\n")


def free(root: Path) -> int:
    answer = free_memory(root)
    assert answer
    return answer.nbytes


def test_without_a_limit_it_is_what_the_kernel_can_give(root: Path) -> None:
    assert free(root) == 9 * GIB


def test_a_system_that_does_not_say_it_limits_nothing(tmp_path: Path) -> None:
    assert free_memory(tmp_path) is None


def test_a_limit_leaves_what_is_not_used_and_what_only_caches_files(root: Path) -> None:
    write(root / "proc/self/cgroup", "0::/job\n")
    limit(root / "sys/fs/cgroup/job", 4 * GIB, 3 * GIB, GIB)

    assert free(root) == 2 * GIB
    assert "cgroup" in str(free_memory(root))


def test_the_narrowest_of_nested_limits_counts(root: Path) -> None:
    write(root / "proc/self/cgroup", "0::/pod/job\n")
    limit(root / "sys/fs/cgroup/pod/job", "max", GIB, 0)
    limit(root / "sys/fs/cgroup/pod", 2 * GIB, GIB, 0)

    assert free(root) == GIB


def test_the_limit_of_a_container_that_sees_the_path_outside_of_it(root: Path) -> None:
    write(root / "proc/self/cgroup", "0::/kubepods/pod7/abc\n")
    limit(root / "sys/fs/cgroup", 3 * GIB, GIB, 0)

    assert free(root) == 2 * GIB


def test_the_first_version_of_cgroups(root: Path) -> None:
    write(root / "proc/self/cgroup", "5:cpu,cpuacct:/a\n4:memory:/job\n0::/\n")
    folder = root / "sys/fs/cgroup/memory/job"
    write(folder / "memory.limit_in_bytes", f"{5 * GIB}\n")
    write(folder / "memory.usage_in_bytes", f"{2 * GIB}\n")
    write(folder / "memory.stat", f"inactive_file 1\ntotal_inactive_file {GIB}\n")
    write(folder.parent / "memory.limit_in_bytes", "9223372036854771712\n")
    write(folder.parent / "memory.usage_in_bytes", "0\n")

    assert free(root) == 4 * GIB


def test_a_limit_that_is_exceeded_leaves_nothing(root: Path) -> None:
    write(root / "proc/self/cgroup", "0::/job\n")
    limit(root / "sys/fs/cgroup/job", GIB, 2 * GIB, 0)

    assert free(root) == 0


def test_this_machine_has_memory() -> None:
    assert free(Path("/")) > 0
    assert resident_bytes() > 10 << 20
