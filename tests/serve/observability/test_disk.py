from __future__ import annotations

import asyncio
import os
import subprocess
from pathlib import Path

from serve.observability.disk import disk_of
from serve.observability.metrics import DISK_AVAILABLE, DISK_SIZE
from tests.serve.measured import Server, logs, server

__all__ = ["logs", "server"]  # fixtures


def test_a_disk_has_the_size_that_the_system_says(tmp_path: Path) -> None:
    said = subprocess.run(["df", "-B1", "--output=size", tmp_path], capture_output=True, text=True, check=True).stdout

    disk = disk_of(tmp_path)

    assert disk
    assert disk.size == int(said.split()[-1])
    assert 0 < disk.available <= os.statvfs(tmp_path).f_bfree * os.statvfs(tmp_path).f_frsize


def test_a_disk_that_is_gone_has_none(tmp_path: Path) -> None:
    assert disk_of(tmp_path / "gone") is None


async def test_the_metrics_have_a_disk_once_it_was_asked(server: Server, tmp_path: Path) -> None:
    assert server.samples(DISK_SIZE.name) == {}

    watching = asyncio.create_task(server.snapshot.watch_disk())
    async with asyncio.timeout(60):
        while not server.samples(DISK_SIZE.name):  # noqa: ASYNC110  (a thread asks the system)
            await asyncio.sleep(0.01)
    watching.cancel()

    disk = disk_of(tmp_path)
    assert disk
    assert server.samples(DISK_SIZE.name) == {(): disk.size}
    assert 0 < server.samples(DISK_AVAILABLE.name)[()] < disk.size
