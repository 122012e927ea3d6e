"""Whether adapters.yaml was applied is in the metrics, also of a follower in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from serve.deployment.ports import free_port
from serve.errors import StoreUnavailable
from serve.follower.file_watch import FileWatcher
from serve.observability.exporter import Exporter
from tests.serve.follower.conftest import RecordingClient


def applied(exposition: str) -> list[float]:
    families = text_string_to_metric_families(exposition)
    return [sample.value for family in families for sample in family.samples
            if sample.name == "graft_adapters_file_applied"]  # fmt: skip


def test_the_metric_follows_what_became_of_the_file(
    file: Path, client: RecordingClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.follower.file_watch._RETRY_S", -1)
    directory = tmp_path / "metrics"
    exporter = Exporter(directory)
    watcher = FileWatcher(file, client, lambda _: None, directory)
    text = file.read_text()

    def after_poll() -> list[float]:
        watcher.poll()
        return applied(exporter.scrape().decode())

    client.fails["table"] = StoreUnavailable("out of reach")
    assert after_poll() == [0], "one adapter of two was refused"
    client.fails.clear()
    assert after_poll() == [1]
    file.write_text("adapters: 7")
    assert after_poll() == [0], "the file can't be read"
    file.write_text(text)
    assert after_poll() == [1], "it is again what was applied"
    client.listed.append({})  # an answer of the server that nobody expected
    file.write_text(text.replace("pinned: true", "pinned: false"))
    assert after_poll() == [0]


def test_a_metric_that_cannot_be_written_keeps_no_adapter_from_being_published(
    file: Path, client: RecordingClient, tmp_path: Path
) -> None:
    (tmp_path / "a file").touch()

    FileWatcher(file, client, lambda _: None, tmp_path / "a file").poll()

    assert "publish pirate" in client.calls


def test_a_follower_of_its_own_tells_it_on_a_port(file: Path, tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "serve", "follow", str(file), "--state", str(tmp_path / "state")]
    process = subprocess.Popen(
        [*command, "--url", "http://127.0.0.1:1", "--metrics-port", str(port)],
        env=os.environ | {"GRAFT_ADMIN_TOKEN": "token"}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stderr
        assert "was not applied" in process.stderr.readline(), "there is no server"
        deadline = time.monotonic() + 60
        while not (values := applied(httpx.get(f"http://127.0.0.1:{port}/metrics").text)):
            assert time.monotonic() < deadline
        assert values == [0]
    finally:
        process.terminate()
        process.wait()
