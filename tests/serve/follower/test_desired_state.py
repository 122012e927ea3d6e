from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from serve.errors import AdminRefused, DesiredStateInvalid
from serve.follower.desired_state import DesiredState, Step, apply, diff, steps_to
from tests.serve.conftest import MakeArtifact
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
        ("adapters: 5", "adapters: Input should be a valid list"),
        ("adapters: [5]", "adapters.0: Input should be an object of names and values"),
        ("adapters: []\npools: [{artifact: nowhere}]", "not an artifact"),
        ("adapters: []\npools: [{artifact: a, replicas: 0}]", "replicas"),
        ("adapters: []\npools: [{artifact: a}, {artifact: b, name: twin}]", "one model in several pools: a, twin"),
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


def pool(base: str, name: str, replicas: int = 1, *, added: bool = True) -> dict[str, Any]:
    """A pool as the admin API lists it."""
    return {
        "name": name, "base": base, "replicas": replicas, "added": added, "state": "running", "max_lora_rank": 16,
        "max_active_adapters": 4, "max_resident_adapters": 16, "vllm_args": [], "sleep_after_s": None,
    }  # fmt: skip


@pytest.fixture
def with_pools(file: Path, make_artifact: MakeArtifact) -> Path:
    make_artifact("m", name="merged", weights=None, base="merged weights")
    make_artifact("z", name="zephyr", weights="3", base="zephyr base", rank=20)
    pools = "pools:\n  - {artifact: m, replicas: 2}\n  - {artifact: z, name: zephyr-base}\nremove_other_pools: true\n"
    file.write_text(pools + file.read_text() + "  - artifact: z\n")
    return file


def test_pools_are_added_before_their_adapters_and_removed_last(with_pools: Path, client: RecordingClient) -> None:
    given = DesiredState.read(with_pools).adapters[0].base
    client.listed_pools.extend([pool(given, "small", added=False), pool("f" * 64, "old")])

    steps = steps_to(DesiredState.read(with_pools), client)
    assert verbs(steps) == [
        "add pool m", "add pool zephyr-base", "publish pirate", "publish table", "publish zephyr", "pin pirate",
        "remove pool old",
    ]  # fmt: skip
    assert apply(DesiredState.read(with_pools), steps, client) == {}
    assert client.calls[:4] == ["add m None 2 None", "wait m", "add z zephyr-base 1 32", "wait zephyr-base"]
    assert client.calls[-1] == "remove old"


def test_nothing_is_done_for_pools_that_are_as_desired(with_pools: Path, client: RecordingClient) -> None:
    desired = DesiredState.read(with_pools)
    merged, zephyr = (wanted.base for wanted in desired.pools)
    client.listed.extend(listing(desired))
    client.listed_pools.extend([pool(merged, "merged", 2), pool(zephyr, "zephyr-base", added=False)])

    assert steps_to(desired, client) == ()
    client.listed_pools[0]["replicas"] = 1
    assert verbs(steps_to(desired, client)) == ["add pool m"], "which the server refuses, and says what to do"
    client.listed_pools[0] |= {"replicas": 2, "state": "starting"}
    assert verbs(steps_to(desired, client)) == ["add pool m"], "which changes nothing, and is waited for"


def test_a_pool_has_settings_of_its_own_where_the_file_gives_them(file: Path, client: RecordingClient) -> None:
    file.write_text(
        "adapters: []\npools:\n  - artifact: b\n    max_active_adapters: 8\n    vllm_args: [--max-model-len=64]\n"
    )
    desired = DesiredState.read(file)
    other = desired.pools[0].base
    steps = steps_to(desired, client)

    assert apply(desired, steps, client) == {}
    assert client.calls == ["add b None 1 None 8 ('--max-model-len=64',)", "wait b"]
    client.listed_pools.append(pool(other, "b"))
    assert verbs(steps_to(desired, client)) == ["add pool b"], "which the server refuses: the pool has other settings"
    client.listed_pools[0] |= {"max_active_adapters": 8, "vllm_args": ["--max-model-len=64"]}
    assert steps_to(desired, client) == ()


def test_no_pool_is_removed_where_the_one_that_may_replace_it_was_refused(
    with_pools: Path, client: RecordingClient
) -> None:
    client.listed_pools.append(pool("f" * 64, "old"))
    client.fails["m"] = AdminRefused("pool_refused", "0 GPUs are free")
    desired = DesiredState.read(with_pools)

    failed = apply(desired, steps_to(desired, client), client)

    assert [str(step) for step in failed] == ["add pool m"]
    assert "remove old" not in client.calls
    assert "publish pirate" in client.calls, "one bad pool blocks no adapter"


def test_a_file_that_says_nothing_of_pools_asks_for_none_and_keeps_its_meaning(
    file: Path, client: RecordingClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server of before has no such route, and a mark of before says that this file was applied."""
    monkeypatch.delattr(RecordingClient, "pools")
    monkeypatch.delattr("serve.follower.admin_client.AdminClient.pools")
    desired = DesiredState.read(file)

    steps_to(desired, client)

    wanted = sorted(desired.adapters, key=lambda adapter: adapter.adapter)
    lines = [f"{one.adapter.name} {one.adapter.revision} {one.pinned}" for one in wanted]
    assert desired.digest == hashlib.sha256("\n".join([*lines, "False"]).encode()).hexdigest()
