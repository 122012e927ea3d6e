from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from serve.catalogue.state_dir import StateDir
from serve.errors import AdminRefused, DesiredStateInvalid, StoreUnavailable
from serve.follower.admin_client import AdminClient
from serve.follower.desired_state import DesiredState, Step, apply, diff
from serve.follower.file_watch import FileWatcher
from tests.serve.conftest import MakeArtifact


class RecordingClient(AdminClient):
    """The server's side in a few lines: what was asked of it, and what it lists then."""

    listed: list[dict[str, Any]]
    calls: list[str]
    fails: dict[str, Exception]

    def __init__(self, root: Path) -> None:
        super().__init__(StateDir(root), "http://nowhere", "token")
        for name, value in (("listed", []), ("calls", []), ("fails", {})):
            object.__setattr__(self, name, value)

    def adapters(self) -> list[dict[str, Any]]:
        return self.listed

    def publish(self, path: Path, name: str | None = None, **options: Any) -> dict[str, Any]:
        return self._take(f"publish {name}", name or "")

    def change(self, verb: str, name: str, revision: str | None, reason: str = "") -> dict[str, Any]:
        return self._take(f"{verb} {name}", name)

    def retire(self, name: str, reason: str = "") -> dict[str, Any]:
        return self._take(f"retire {name}", name)

    def _take(self, call: str, name: str) -> dict[str, Any]:
        self.calls.append(call)
        if name in self.fails:
            raise self.fails[name]
        return {}


@pytest.fixture
def client(tmp_path: Path) -> RecordingClient:
    return RecordingClient(tmp_path)


@pytest.fixture
def file(tmp_path: Path, make_artifact: MakeArtifact) -> Path:
    make_artifact("a", name="pirate", weights="1")
    make_artifact("b", name="json", weights="2")
    path = tmp_path / "adapters.yaml"
    path.write_text("adapters:\n  - artifact: a\n    pinned: true\n  - {artifact: b, name: table}\n")
    return path


def listing(desired: DesiredState, *others: str, pinned: bool = True) -> list[dict[str, Any]]:
    """What the admin API lists when all is as desired, and other names."""
    rows = [
        {
            "name": entry.adapter.name,
            "current": entry.adapter.engine_name,
            "pinned": [entry.adapter.engine_name] if entry.pinned and pinned else [],
        }
        for entry in desired.adapters
    ]
    return [
        *rows,
        *({"name": name, "current": f"{name}@{'0' * 12}", "pinned": [f"{name}@{'0' * 12}"]} for name in others),
    ]


def verbs(steps: tuple[Step, ...]) -> list[str]:
    return [str(step).partition("@")[0] for step in steps]


def test_the_steps_lead_from_what_there_is_to_what_is_desired(file: Path) -> None:
    desired = DesiredState.read(file)

    assert verbs(diff(desired, [])) == ["publish pirate", "publish table", "pin pirate"]
    assert diff(desired, listing(desired)) == ()
    assert verbs(diff(desired, listing(desired, pinned=False))) == ["pin pirate"]


def test_what_is_not_listed_stays_unless_the_file_says_otherwise(file: Path) -> None:
    desired = DesiredState.read(file)
    assert diff(desired, listing(desired, "old")) == ()

    file.write_text(file.read_text() + "retire_others: true\n")
    assert verbs(diff(DesiredState.read(file), listing(desired, "old"))) == ["unpin old", "retire old"]


def test_a_new_revision_moves_the_pin_with_it(file: Path) -> None:
    desired = DesiredState.read(file)
    listed = listing(desired)
    listed[0] |= {"current": "pirate@000000000000", "pinned": ["pirate@000000000000"]}

    assert verbs(diff(desired, listed)) == ["publish pirate", "pin pirate", "unpin pirate"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("adapters: [", "can't be read"),
        ("adapters: 3", "adapters"),
        ("adapters: []\nreplicas: 3", "replicas"),
        ("adapters:\n  - artifact: nowhere", "not an artifact"),
        ("adapters:\n  - {artifact: a, name: Not A Name}", "name"),
        ("adapters:\n  - artifact: a\n  - {artifact: b, name: pirate}", "pirate more than once"),
        ("adapters: [!!python/object/apply:os.system ['true']]", "can't be read"),
    ],
)
def test_a_file_that_says_what_cannot_be_is_reported(file: Path, content: str, message: str) -> None:
    file.write_text(content)

    with pytest.raises(DesiredStateInvalid, match=message):
        DesiredState.read(file)


def test_one_bad_adapter_blocks_no_other(file: Path, client: RecordingClient) -> None:
    client.fails["pirate"] = AdminRefused("adapter_rejected", "it holds NaN")
    desired = DesiredState.read(file)

    failed = apply(desired, diff(desired, []), client)

    assert client.calls == ["publish pirate", "publish table"]
    assert [(str(step).partition("@")[0], error.code) for step, error in failed.items()] == [
        ("publish pirate", "adapter_rejected")
    ]


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
