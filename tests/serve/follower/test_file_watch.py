"""adapters.yaml is followed whatever happens to it, to its artifacts, and to the server."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import pytest

from serve.errors import AdminRefused, StoreUnavailable
from serve.follower.desired_state import DesiredState
from serve.follower.file_watch import FileWatcher
from tests.serve.conftest import MakeArtifact
from tests.serve.follower.conftest import RecordingClient, listing


def test_a_watched_file_is_applied_when_what_it_says_changes_and_only_then(
    file: Path, client: RecordingClient, make_artifact: MakeArtifact, tmp_path: Path
) -> None:
    reports: list[str] = []
    watcher = FileWatcher(file, client, reports.append)
    watcher.poll()
    assert client.calls == ["publish pirate", "publish table", "pin pirate"]
    client.calls.clear()
    client.listed[:] = listing(DesiredState.read(file))

    watcher.poll()
    file.write_text(file.read_text() + "# a comment\n")
    watcher.poll()
    assert client.calls == []

    (tmp_path / "a" / "manifest.json").write_text(
        make_artifact("c", name="pirate", weights="3").root.joinpath("manifest.json").read_text()
    )
    watcher.poll()
    assert client.calls[0] == "publish pirate"
    assert len(reports) == 2


def test_a_rollback_by_hand_is_not_undone_by_a_restart(file: Path, client: RecordingClient) -> None:
    FileWatcher(file, client, lambda _: None).poll()
    client.calls.clear()
    client.listed[:] = [row | {"current": "pirate@000000000000"} for row in listing(DesiredState.read(file))]

    FileWatcher(file, client, lambda _: None).poll()

    assert client.calls == []


def test_what_may_pass_is_tried_again_and_what_may_not_waits_for_a_change(
    file: Path, client: RecordingClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.follower.file_watch._RETRY_S", -1)
    reports: list[str] = []
    watcher = FileWatcher(file, client, reports.append)
    client.fails["table"] = StoreUnavailable("out of reach")
    watcher.poll()
    watcher.poll()
    assert client.calls.count("publish table") == 2

    client.fails["table"] = AdminRefused("adapter_rejected", "it holds NaN")
    watcher.poll()
    watcher.poll()
    assert client.calls.count("publish table") == 3
    assert "error[adapter_rejected]" in reports[-1]


@pytest.mark.parametrize("error", [OSError("no such file"), KeyError("pinned")], ids=["disk", "answer"])
def test_an_unexpected_error_is_printed_and_the_file_is_applied_again(
    file: Path, client: RecordingClient, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr("serve.follower.file_watch._RETRY_S", -1)
    reports: list[str] = []
    watcher = FileWatcher(file, client, reports.append)
    client.fails["pirate"] = error
    watcher.poll()
    assert repr(error) in reports[-1]

    client.fails.clear()
    watcher.poll()
    assert "applied: publish pirate" in reports[-1]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What may be over is tried again with the next poll."""
    monkeypatch.setattr("serve.follower.file_watch._RETRY_S", -1)


@pytest.mark.parametrize("broken", ["read_text", "read_bytes", "is_file"])
@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ENOTDIR], ids=errno.errorcode.get)
@pytest.mark.usefixtures("impatient")
def test_a_broken_disk_is_reported_once_and_the_file_applied_when_it_is_over(
    file: Path, client: RecordingClient, broken: str, number: int
) -> None:
    """No file changes in between."""
    reports: list[str] = []
    watcher = FileWatcher(file, client, reports.append)

    def fail(path: Path, *_: object, **__: object) -> Any:
        raise OSError(number, "injected", str(path))

    with pytest.MonkeyPatch.context() as disk:
        disk.setattr(Path, broken, fail)
        for _ in range(3):
            watcher.poll()
    assert (len(reports), client.calls) == (1, [])
    assert "injected" in reports[0]

    watcher.poll()

    assert client.calls == ["publish pirate", "publish table", "pin pirate"]
    assert "failed attempts before: 3" in reports[-1]


@pytest.mark.usefixtures("impatient")
def test_a_reason_is_said_again_after_a_change(file: Path, client: RecordingClient) -> None:
    reports: list[str] = []
    watcher = FileWatcher(file, client, reports.append)
    client.fails["table"] = StoreUnavailable("out of reach")
    for _ in range(3):
        watcher.poll()
    assert len(reports) == 1

    file.write_text(file.read_text() + "# a comment\n")
    watcher.poll()

    assert len(reports) == 2


def test_a_line_that_can_not_be_printed_does_not_end_the_watch(file: Path, client: RecordingClient) -> None:
    def print_line(_: str) -> None:
        raise OSError(errno.EIO, "the terminal was closed")

    watcher = FileWatcher(file, client, print_line)
    client.fails["pirate"] = AdminRefused("adapter_rejected", "it holds NaN")
    watcher.poll()
    client.fails.clear()
    file.write_text(file.read_text() + "# a comment\n")
    watcher.poll()

    assert client.calls[-3:] == ["publish pirate", "publish table", "pin pirate"]


def test_an_artifact_that_appears_later_is_applied_though_the_file_did_not_change(
    file: Path, client: RecordingClient, tmp_path: Path
) -> None:
    (tmp_path / "b").rename(tmp_path / "elsewhere")
    watcher = FileWatcher(file, client, lambda _: None)
    watcher.poll()
    assert client.calls == []

    shutil.copytree(tmp_path / "elsewhere", tmp_path / "b")
    watcher.poll()

    assert client.calls == ["publish pirate", "publish table", "pin pirate"]


def test_a_change_while_the_file_is_applied_is_not_missed(file: Path, client: RecordingClient) -> None:
    class Editing(RecordingClient):
        def publish(self, path: Path, name: str | None = None, **options: Any) -> dict[str, Any]:
            if not self.calls:
                file.write_text("adapters: [{artifact: b, name: late}]")
            return super().publish(path, name, **options)

    editing = Editing(client.state.root)
    watcher = FileWatcher(file, editing, lambda _: None)

    watcher.poll()
    watcher.poll()

    assert editing.calls[-1] == "publish late"


def test_a_name_that_no_file_can_have_does_not_end_the_watch(file: Path, client: RecordingClient) -> None:
    good = file.read_text()
    reports: list[str] = []
    watcher = FileWatcher(file, client, reports.append)
    file.write_text('adapters: [{artifact: "a\\0b"}]')
    watcher.poll()
    watcher.poll()
    assert client.calls == []
    assert reports

    file.write_text(good)
    watcher.poll()

    assert client.calls == ["publish pirate", "publish table", "pin pirate"]
