from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from serve.observability.memory import Memory, MemoryWatch, largest_process, memory_left, memory_limit_bytes

GIB = 2**30
V2 = ("sys/fs/cgroup", "memory.max", "memory.current", "")
V1 = ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_")


def group(root: Path, version: tuple[str, str, str, str], limit: str, used: int, cached: int) -> None:
    directory, limit_file, usage_file, prefix = version
    (root / directory).mkdir(parents=True)
    (root / directory / limit_file).write_text(f"{limit}\n")
    (root / directory / usage_file).write_text(f"{used}\n")
    (root / directory / "memory.stat").write_text(
        f"anon 1\n{prefix}inactive_file {cached - 7}\n{prefix}active_file 7\n"
    )


def test_without_a_container_it_is_the_memory_of_the_machine(tmp_path: Path) -> None:
    assert memory_left(tmp_path).limit == psutil.virtual_memory().total


@pytest.mark.parametrize("version", [V1, V2], ids=["v1", "v2"])
def test_the_limit_of_a_container_counts_without_its_cache_of_files(
    tmp_path: Path, version: tuple[str, str, str, str]
) -> None:
    group(tmp_path, version, str(64 << 20), used=60 << 20, cached=12 << 20)

    assert memory_left(tmp_path) == Memory(available=16 << 20, limit=64 << 20)
    assert memory_limit_bytes(tmp_path) == 64 << 20


@pytest.mark.parametrize(("version", "limit"), [(V1, "9223372036854771712"), (V2, "max")], ids=["v1", "v2"])
def test_a_container_without_a_limit_has_the_memory_of_the_machine(
    tmp_path: Path, version: tuple[str, str, str, str], limit: str
) -> None:
    group(tmp_path, version, limit, used=60 << 20, cached=0)

    assert memory_left(tmp_path).limit == psutil.virtual_memory().total


def test_it_warns_once_while_memory_is_short() -> None:
    watch = MemoryWatch()
    shares = [0.5, 0.04, 0.03, 0.06, 0.04, 0.11, 0.04]

    warnings = [watch.warning(Memory(int(share * 100 * GIB), 100 * GIB)) for share in shares]

    assert [bool(warning) for warning in warnings] == [False, True, False, False, False, False, True]
    assert str(warnings[1]).startswith("Warning: 4.0 of 100.0 GiB of memory are left. Process ")


def test_the_largest_process_is_named_without_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    class Listed:
        def __init__(self, pid: int, rss: int | None) -> None:
            memory = SimpleNamespace(rss=rss) if rss is not None else None  # None: not readable for this user
            self.info = {"pid": pid, "name": f"program-{pid}", "memory_info": memory}

    monkeypatch.setattr(psutil, "process_iter", lambda attributes: map(Listed, (1, 2, 3), (GIB, 3 * GIB, None)))

    assert largest_process() == "Process 2 (program-2, 3.0 GiB)"
