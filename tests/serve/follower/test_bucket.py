"""A follower of a server with its state in a bucket: what it keeps there, and what it leaves on its own disk."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from serve.catalogue.state_dir import StateDir
from serve.follower.admin_client import AdminClient
from serve.follower.file_watch import FileWatcher
from serve.names import AdapterRevision
from tests.serve.conftest import MakeArtifact


class Server(ThreadingHTTPServer):
    """Lists no adapters, and records what it is asked to publish."""

    def __init__(self) -> None:
        self.published: list[dict[str, Any]] = []
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self._answer({"adapters": []})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.published.append(body["candidate"])
        self._answer({})

    def _answer(self, document: dict[str, Any]) -> None:
        content = json.dumps(document).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def file(tmp_path: Path, make_artifact: MakeArtifact) -> Path:
    make_artifact("a", name="pirate", weights="1")
    path = tmp_path / "adapters.yaml"
    path.write_text("adapters: [{artifact: a}]\n")
    return path


def follow(file: Path, server: Server, url: str, disk: Path) -> list[str]:
    """What a new follower with this disk prints."""
    printed: list[str] = []
    FileWatcher(file, AdminClient(StateDir(url, disk), server.url, "token"), printed.append).poll()
    return printed


def test_a_follower_on_another_machine_does_not_undo_what_was_done_by_hand(
    file: Path, server: Server, url: str, tmp_path: Path
) -> None:
    """The listing lacks the adapter, as after a `retire` by hand: a follower that knows nothing would publish it."""
    assert "publish pirate" in follow(file, server, url, tmp_path / "first")[0]

    assert follow(file, server, url, tmp_path / "second") == []
    assert len(server.published) == 1


def test_a_file_that_changes_back_is_applied_again(file: Path, server: Server, url: str, tmp_path: Path) -> None:
    first = file.read_text()
    follow(file, server, url, tmp_path / "first")
    file.write_text("adapters: []\n")
    follow(file, server, url, tmp_path / "second")

    file.write_text(first)
    follow(file, server, url, tmp_path / "third")

    assert [candidate["name"] for candidate in server.published] == ["pirate", "pirate"]


def test_publishing_leaves_no_copy_on_the_disk_of_the_publisher(
    file: Path, server: Server, url: str, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    follow(file, server, url, disk)

    assert [path for path in disk.rglob("*") if path.is_file()] == []
    (candidate,) = server.published
    replica = StateDir(url, tmp_path / "replica").store
    assert replica.path(AdapterRevision(candidate["name"], candidate["revision"])).is_dir()
