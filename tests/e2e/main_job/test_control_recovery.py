"""A publish during which a process is killed, and the history after all of it."""

from __future__ import annotations

import threading
import time

import pytest

from serve.follower.admin_client import AdminClient
from tests.e2e.conftest import REPLICAS, Server, Story
from tests.e2e.main_job.control import answer, held

RECOVERY_S = 240


@pytest.mark.parametrize("actor", ["EngineReplica", "ServeController"])
def test_what_is_killed_during_a_publish_leaves_a_consistent_catalogue(
    server: Server, story: Story, admin: AdminClient, actor: str
) -> None:
    """Whatever the publish then tells its caller, the alias means one revision everywhere, nothing stays half
    staged, and a replica that takes the place of a killed one holds what the catalogue says before it answers."""
    admin.publish(story.artifacts["german"], "swiss")
    victim, replicas = server.actors(actor)[0], names(admin)
    outcome: list[str] = []

    def publish() -> None:
        outcome.append(server.command("publish", story.artifacts["french-2"], "--name", "swiss").stderr)

    publishing = threading.Thread(target=publish)
    publishing.start()
    while not admin.state.log.read().staged and publishing.is_alive():
        time.sleep(0.002)
    victim.kill()
    publishing.join()
    wait_for_replicas(admin)
    assert len(replicas & names(admin)) == (REPLICAS if actor == "ServeController" else REPLICAS - 1)

    state = admin.state.log.read().adapters["swiss"]
    assert not any(revision.staged for revision in state.revisions.values()), outcome
    assert state.current is not None
    current = state.current.candidate.adapter.engine_name
    assert all(current in resident for resident in held(admin)), outcome
    assert {answer(server, "swiss").headers["x-graft-model"] for _ in range(2 * REPLICAS)} == {current}
    admin.retire("swiss")


def names(admin: AdminClient) -> set[str]:
    return {replica["replica"] for replica in admin.replicas()}


def wait_for_replicas(admin: AdminClient) -> None:
    """Until as many as before answer and nothing is staged any more: an orphan is given up after its time."""
    deadline = time.monotonic() + RECOVERY_S
    while time.monotonic() < deadline:
        try:
            if len(admin.replicas()) == REPLICAS and not admin.state.log.read().staged:
                return
        except Exception as error:
            print(error)
        time.sleep(1)
    raise AssertionError("the replica did not come back")


def test_history_tells_everything_that_was_done(story: Story, admin: AdminClient) -> None:
    name, before = "historian", admin.history(None, 1000)
    first = admin.publish(story.artifacts["german"], name)["revision"].partition("@")[2]
    second = admin.publish(story.artifacts["french"], name)["revision"].partition("@")[2]
    staged = admin.publish(story.artifacts["french-2"], name, stage_only=True)["revision"].partition("@")[2]
    for verb, revision in (("abandon", staged), ("pin", second), ("unpin", second), ("rollback", first)):
        admin.change(verb, name, revision)
    admin.retire(name)

    history = admin.history(None, 1000)
    done = [entry for entry in history if entry not in before]

    assert [entry["epoch"] for entry in reversed(history)] == list(range(1, len(history) + 1))
    assert [entry["verb"] for entry in reversed(done)] == [
        *("stage", "promote") * 2,
        "stage",
        *("abandon", "pin", "unpin", "rollback", "retire"),
    ]
    assert all(entry["by"] and entry["at"] for entry in history)


def test_the_lineage_of_a_revision_is_shown(admin: AdminClient) -> None:
    lineage = admin.show("french")["revisions"][0]["lineage"]

    assert (lineage["training"], lineage["route"], lineage["layout"]) == ("qlora", "adapter", "ms-swift")
    assert len(lineage["origin"]) == 64
