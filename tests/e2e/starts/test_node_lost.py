"""A server whose Ray has died ends, says so, and leaves nothing behind."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil

from examples.server import start, stop, wait_until_ready
from serve.catalogue.state_dir import StateDir
from serve.deployment.ports import free_port
from tests.e2e.conftest import ENGINE_OPTIONS, Story, arguments_of


def test_a_server_whose_node_dies_ends_with_its_reason_and_leaves_nothing_behind(story: Story, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "serve", "run", str(story.artifacts["french"]), "--state", str(tmp_path / "state")]
    log = tmp_path / "log"
    with log.open("w") as output:
        server = start([*command, "--port", str(free_port()), *ENGINE_OPTIONS], output)
    try:
        wait_until_ready(server, StateDir(tmp_path / "state"), log)
        processes = psutil.Process(server.pid).children(recursive=True)
        next(process for process in processes if "/raylet/raylet" in " ".join(arguments_of(process)[:1])).kill()

        assert server.wait(60) == 1
    finally:
        stop(server)

    assert "error[node_lost]" in log.read_text()
    assert [process for process in processes if process.is_running()] == []
