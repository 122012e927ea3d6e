"""The page for a laptop's cluster, typed word by word: everything but an engine."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.convert import parts
from tests.deploy.manifests import ROOT
from tests.deploy.rehearsal.controllers import Cluster
from tests.deploy.rehearsal.documentation import documents_in, shell_blocks
from tests.deploy.rehearsal.laptop import Laptop
from tests.deploy.rehearsal.requirements import REHEARSABLE

pytestmark = REHEARSABLE

PAGE = ROOT / "docs" / "tutorials" / "laptop-cluster.md"
CLUSTERS = ("kind", "minikube", "k3s")
WEIGHTS = "adapter_model.safetensors"
# What the examples do, from what lies ready: no model is downloaded, none is trained.
EXAMPLES = {
    "__init__": "",
    "base_model": "shutil.copytree({ready!r} + '/base', sys.argv[1])",
    "finetune": "shutil.copytree({ready!r} + '/checkpoint', sys.argv[sys.argv.index('--out') + 1])",
}


@dataclass(frozen=True)
class Rehearsal:
    failed: str
    answered: dict[str, str]
    key: str
    asked_again: str
    left: tuple[list[str], bool]


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rehearsal]:
    home = tmp_path_factory.mktemp("rehearsal")
    with (
        contextlib.closing(Cluster(home / "cluster")) as cluster,
        contextlib.closing(Laptop(cluster, home / "laptop", engine=False)) as laptop,
    ):
        blocks = {block.heading: [] for block in shell_blocks(PAGE)}
        for block in shell_blocks(PAGE):
            blocks[block.heading].append(block.code)
        ready = examples_ready(home / "ready", laptop.directory)
        failed = laptop.type("".join(blocks["With kind"]), fails=True)
        shutil.copy(ready / WEIGHTS, laptop.directory / "build" / "tutorial" / "checkpoints" / "pirate")
        answered = {}
        for name in CLUSTERS:
            cluster.node.images.clear()
            answered[name] = laptop.type("".join(blocks[f"With {name}"]))
        key = (laptop.directory / "build" / "laptop" / "key").read_text().strip()
        asked_again = [laptop.type(code) for code in blocks["Ask more"]][-1]
        laptop.type("".join(blocks["Remove it"]))
        left = ([pod.name for pod in cluster.pods()], (laptop.directory / "build" / "laptop").exists())
        yield Rehearsal(failed, answered, key, asked_again, left)


def examples_ready(ready: Path, laptop: Path) -> Path:
    """Modules named like the examples, which hand out a base model, and a checkpoint whose weights are missing."""
    parts.mark_qlora(parts.save_adapter(parts.save_base(ready / "base", tied=True), ready / "checkpoint"))
    (ready / "checkpoint" / WEIGHTS).rename(ready / WEIGHTS)
    (laptop / "examples").mkdir()
    for name, line in EXAMPLES.items():
        (laptop / "examples" / f"{name}.py").write_text(f"import shutil, sys\n{line.format(ready=str(ready))}\n")
    return ready


def test_a_conversion_that_fails_says_why_and_stops_the_script(rehearsal: Rehearsal) -> None:
    assert "adapter_model" in rehearsal.failed
    assert "The conversion failed" in rehearsal.failed
    assert "the server starts" not in rehearsal.failed


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_the_script_ends_with_an_answer(rehearsal: Rehearsal, cluster: str) -> None:
    """On the first cluster after the checkpoint was mended, on the others over what is there."""
    output = rehearsal.answered[cluster]

    (answer,) = [document for document in documents_in(output) if "choices" in document]
    assert answer["model"].startswith("pirate@")
    assert "The first answer came after" in output


def test_no_output_shows_the_key(rehearsal: Rehearsal) -> None:
    assert len(rehearsal.key) > 30
    assert all(rehearsal.key not in output for output in rehearsal.answered.values())


def test_the_page_asks_with_the_key_that_the_script_made(rehearsal: Rehearsal) -> None:
    assert documents_in(rehearsal.asked_again)[-1]["model"].startswith("pirate@")


def test_nothing_is_left(rehearsal: Rehearsal) -> None:
    assert rehearsal.left == ([], False)
