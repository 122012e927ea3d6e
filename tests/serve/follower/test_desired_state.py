from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from serve.desired import Desired, Step, apply, diff
from serve.errors import AdminRefused, DesiredStateInvalid, StoreUnavailable
from serve.remote import AdminClient
from serve.state import StateDir
from serve.watch import Watcher
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

    def _take(self, what: str, name: str) -> dict[str, Any]:
        self.calls.append(what)
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


def listing(desired: Desired, *others: str, pinned: bool = True) -> list[dict[str, Any]]:
    """What the admin API lists when all is as desired, and other names."""
    found = [
        {
            "name": it.adapter.name,
            "current": it.adapter.engine_name,
            "pinned": [it.adapter.engine_name] if it.pinned and pinned else [],
        }
        for it in desired.wanted
    ]
    return [*found, *({"name": it, "current": f"{it}@{'0' * 12}", "pinned": [f"{it}@{'0' * 12}"]} for it in others)]


def verbs(steps: tuple[Step, ...]) -> list[str]:
    return [str(it).partition("@")[0] for it in steps]


def test_the_steps_lead_from_what_there_is_to_what_is_desired(file: Path) -> None:
    desired = Desired.read(file)

    assert verbs(diff(desired, [])) == ["publish pirate", "publish table", "pin pirate"]
    assert diff(desired, listing(desired)) == ()
    assert verbs(diff(desired, listing(desired, pinned=False))) == ["pin pirate"]


def test_what_is_not_listed_stays_unless_the_file_says_otherwise(file: Path) -> None:
    desired = Desired.read(file)
    assert diff(desired, listing(desired, "old")) == ()

    file.write_text(file.read_text() + "retire_others: true\n")
    assert verbs(diff(Desired.read(file), listing(desired, "old"))) == ["unpin old", "retire old"]


def test_a_new_revision_moves_the_pin_with_it(file: Path) -> None:
    desired = Desired.read(file)
    found = listing(desired)
    found[0] |= {"current": "pirate@000000000000", "pinned": ["pirate@000000000000"]}

    assert verbs(diff(desired, found)) == ["publish pirate", "pin pirate", "unpin pirate"]


@pytest.mark.parametrize(
    ("content", "told"),
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
def test_a_file_that_says_what_cannot_be_is_told(file: Path, content: str, told: str) -> None:
    file.write_text(content)

    with pytest.raises(DesiredStateInvalid, match=told):
        Desired.read(file)


def test_one_bad_adapter_blocks_no_other(file: Path, client: RecordingClient) -> None:
    client.fails["pirate"] = AdminRefused("adapter_rejected", "it holds NaN")
    desired = Desired.read(file)

    failed = apply(desired, diff(desired, []), client)

    assert client.calls == ["publish pirate", "publish table"]
    assert [(str(step).partition("@")[0], error.code) for step, error in failed.items()] == [
        ("publish pirate", "adapter_rejected")
    ]


def test_a_watched_file_is_applied_when_what_it_says_changes_and_only_then(
    file: Path, client: RecordingClient, make_artifact: MakeArtifact, tmp_path: Path
) -> None:
    told: list[str] = []
    watcher = Watcher(file, client, told.append)
    watcher.look()
    assert client.calls == ["publish pirate", "publish table", "pin pirate"]
    client.calls.clear()
    client.listed[:] = listing(Desired.read(file))

    watcher.look()
    file.write_text(file.read_text() + "# a comment\n")
    watcher.look()
    assert client.calls == []

    (tmp_path / "a" / "manifest.json").write_text(
        make_artifact("c", name="pirate", weights="3").root.joinpath("manifest.json").read_text()
    )
    watcher.look()
    assert client.calls[0] == "publish pirate"
    assert len(told) == 2


def test_a_rollback_by_hand_is_not_undone_by_a_restart(file: Path, client: RecordingClient) -> None:
    Watcher(file, client, lambda _: None).look()
    client.calls.clear()
    client.listed[:] = [it | {"current": "pirate@000000000000"} for it in listing(Desired.read(file))]

    Watcher(file, client, lambda _: None).look()

    assert client.calls == []


def test_what_may_pass_is_tried_again_and_what_may_not_waits_for_a_change(
    file: Path, client: RecordingClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.watch._RETRY_S", -1)
    told: list[str] = []
    watcher = Watcher(file, client, told.append)
    client.fails["table"] = StoreUnavailable("out of reach")
    watcher.look()
    watcher.look()
    assert client.calls.count("publish table") == 2

    client.fails["table"] = AdminRefused("adapter_rejected", "it holds NaN")
    watcher.look()
    watcher.look()
    assert client.calls.count("publish table") == 3
    assert "error[adapter_rejected]" in told[-1]
