"""The tutorial of a first deployment, typed word by word, on what its manifests say."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.convert import parts
from tests.deploy.manifests import ROOT
from tests.deploy.rehearsal.controllers import Cluster
from tests.deploy.rehearsal.documentation import documents_in, shell_blocks
from tests.deploy.rehearsal.laptop import Laptop
from tests.deploy.rehearsal.requirements import ON_REQUEST
from tests.e2e.conftest import fine_tune

pytestmark = [*ON_REQUEST, pytest.mark.engine]

PAGE = ROOT / "docs" / "tutorials" / "first-kubernetes-deployment.md"
NOT_ENFORCED = "not enforced: limits of memory and CPU, seccomp, sizes of claims, network policies; no image was built"


@dataclass(frozen=True)
class Rehearsal:
    """What the commands of the page printed, by their heading, and what ran at the end of each."""

    printed: dict[str, list[str]]
    restarts: dict[str, dict[str, int]]

    def last_json(self, heading: str) -> Any:
        """What the last curl under a heading got."""
        return documents_in(self.printed[heading][-1])[-1]


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rehearsal]:
    home = tmp_path_factory.mktemp("rehearsal")
    with (
        contextlib.closing(Cluster(home / "cluster")) as cluster,
        contextlib.closing(Laptop(cluster, home / "laptop")) as laptop,
    ):
        fine_tuned(laptop.directory / "build" / "tutorial")
        printed: dict[str, list[str]] = {}
        restarts = {}
        key = ""
        for block in shell_blocks(PAGE):
            output = laptop.type(block.code.replace("PASTE_THE_KEY_HERE", key))
            key = key_in(output) or key
            printed.setdefault(block.heading, []).append(output)
            restarts[block.heading] = {pod.name: pod.restarts for pod in cluster.pods()}
        print(NOT_ENFORCED)
        yield Rehearsal(printed, restarts)


def key_in(output: str) -> str:
    match = re.search(r"^\S{30,}$", output, flags=re.MULTILINE)
    return match[0] if match else ""


def fine_tuned(directory: Path) -> None:
    """What the reader of the tutorial before has: a base, and two checkpoints."""
    base = parts.save_base(directory / "base", tied=True, hidden=128)
    fine_tune(base, directory / "checkpoints" / "pirate", 0)
    fine_tune(base, directory / "checkpoints" / "zephyr" / "v0-20260101" / "checkpoint-20", 1)


def test_the_first_answer_comes_through_the_service(rehearsal: Rehearsal) -> None:
    answer = rehearsal.last_json("7. Send a request")

    assert answer["model"].partition("@")[0] == "pirate"
    assert answer["choices"][0]["message"]["content"]


def test_a_job_adds_an_adapter_and_nothing_restarts(rehearsal: Rehearsal) -> None:
    answer = rehearsal.last_json("8. Add an adapter")

    assert answer["model"].partition("@")[0] == "zephyr"
    assert answer["choices"][0]["message"]["content"]
    assert rehearsal.restarts["6. Wait for the server"].items() <= rehearsal.restarts["8. Add an adapter"].items()


def test_a_conversion_says_what_it_did_in_its_log(rehearsal: Rehearsal) -> None:
    assert "route" in rehearsal.printed["5. Convert the checkpoint"][-1]


def test_nothing_is_left_after_the_last_step(rehearsal: Rehearsal) -> None:
    assert rehearsal.restarts["9. Clean up"] == {}
