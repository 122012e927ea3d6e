"""What a start does while Ray Serve tries to start its engines, and a server while Ray runs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from serve.deployment import local
from serve.deployment.local import wait_while_ray_runs
from serve.deployment.pools.start import wait_until_running
from serve.errors import EngineStartFailed, NodeLost

SLOW = "Deployment has 1 replicas that have taken more than 30s to initialize. This may be caused by a slow __init__."
RETRYING = """A replica failed to start with exception. Retrying 2 more time(s). Error:
Traceback (most recent call last):
  File "replica.py", line 1, in __init__
serve.errors.start.{kind}: vLLM can't serve this: {reason}
"""


def seen(status: str, message: str = "") -> Any:
    """An application as Ray Serve reports it."""
    deployment = SimpleNamespace(message=message, replica_states={"RUNNING": int(status == "RUNNING")})
    return SimpleNamespace(status=status, message="", deployments={"EngineReplica": deployment})


def wait(applications: Sequence[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.deployment.pools.start._POLL_S", 0)
    overviews = ({} if application is None else {"graft": application} for application in applications)
    wait_until_running(lambda: next(overviews), {"graft": "small-llama"}, 1, lambda step: None)


def test_what_cannot_get_better_ends_the_start_at_the_first_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = seen("DEPLOYING", RETRYING.format(kind="EngineRefused", reason="no tokens for this parser"))

    with pytest.raises(EngineStartFailed) as error:
        wait([None, seen("DEPLOYING"), refused], monkeypatch)

    assert str(error.value) == "The engine did not start: vLLM can't serve this: no tokens for this parser"


def test_every_other_failure_is_shown_once_while_it_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failed = seen("DEPLOYING", RETRYING.format(kind="EngineStartFailed", reason="RuntimeError: CUDA error"))

    with caplog.at_level(logging.WARNING):
        wait([seen("DEPLOYING", SLOW), failed, failed, seen("RUNNING")], monkeypatch)

    assert [record.message for record in caplog.records] == [
        "Warning: an engine did not start, and is tried again: vLLM can't serve this: RuntimeError: CUDA error"
    ]


def test_the_last_attempt_ends_the_start_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    message = RETRYING.format(kind="EngineStartFailed", reason="RuntimeError: CUDA error")

    with pytest.raises(EngineStartFailed, match=r"did not start: vLLM can't serve this: RuntimeError: CUDA error$"):
        wait([seen("DEPLOY_FAILED", message)], monkeypatch)


class Ray:
    """The process of Ray's own that this process has: it runs for some questions, and then it has ended. As long as
    nobody has asked how, the system knows it as a zombie."""

    def __init__(self, questions: int, *, is_zombie: bool) -> None:
        self.questions = questions
        self.is_zombie = is_zombie

    def children(self) -> list[Ray]:
        return [self]

    def name(self) -> str:
        return "raylet"

    def is_running(self) -> bool:
        return True

    def status(self) -> str:
        self.questions -= 1
        assert self.questions >= -1, "it was asked again after its end"
        if self.questions < 0 and not self.is_zombie:
            raise psutil.NoSuchProcess(1)
        return "sleeping" if self.questions >= 0 else psutil.STATUS_ZOMBIE


@pytest.mark.parametrize(("fails", "is_zombie"), [("memory_left", False), ("warn", True)])
def test_a_warning_that_can_not_be_given_does_not_end_the_server_and_the_end_of_ray_does(
    monkeypatch: pytest.MonkeyPatch, fails: str, is_zombie: bool
) -> None:
    def fail(*_: object) -> Any:
        raise OSError("the disk, or the terminal")

    ray = Ray(questions=3, is_zombie=is_zombie)
    monkeypatch.setattr(psutil, "Process", lambda: ray)
    monkeypatch.setattr(local, "_NODE_POLL_S", 0)
    memory = SimpleNamespace(available=0, limit=1 << 40, is_short=True)
    monkeypatch.setattr(local, "memory_left", fail if fails == "memory_left" else lambda: memory)
    monkeypatch.setattr("serve.observability.memory.largest_process", lambda: "This one")

    with pytest.raises(NodeLost):
        wait_while_ray_runs(fail)

    assert ray.questions == -1
