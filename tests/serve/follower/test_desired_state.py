from __future__ import annotations

from pathlib import Path

import pytest

from serve.errors import AdminRefused, DesiredStateInvalid
from serve.follower.desired_state import DesiredState, Step, apply, diff
from tests.serve.follower.conftest import RecordingClient, listing


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
        ("adapters: [{artifact: a}]\nretire_others: true\nadapters: []", "found the key 'adapters' twice"),
        ("adapters:\n  - {artifact: a, pinned: true, artifact: b}", "found the key 'artifact' twice"),
        ("? [1]\n: 2", "can't be read"),
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
