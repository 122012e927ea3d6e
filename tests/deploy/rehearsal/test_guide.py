"""The guide for one's own cluster, typed word by word with a machine that has a GPU: everything but an engine."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

import pytest

from tests.convert import parts
from tests.deploy.manifests import ROOT
from tests.deploy.rehearsal.controllers import Cluster
from tests.deploy.rehearsal.documentation import documents_in, shell_blocks
from tests.deploy.rehearsal.laptop import Laptop
from tests.deploy.rehearsal.node.resources import Resources
from tests.deploy.rehearsal.requirements import ON_REQUEST

pytestmark = ON_REQUEST

HOW_TO = ROOT / "docs" / "how-to"
GUIDE = HOW_TO / "deploy-on-kubernetes.md"
GPU_NODE = Resources(Decimal(7), Decimal(60 * 2**30))  # of 8 cores and 64 GiB
OTHER_NAMESPACE = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "apps"}}
WEIGHTS = "adapter_model.safetensors"
NEXT_JOB = "job graft-convert-support-2"
ASK = """curl localhost:8000/v1/chat/completions -H "authorization: Bearer $KEY" -H 'content-type: application/json' \\
-d '{"model": "support", "messages": [{"role": "user", "content": "Who are you?"}]}'
"""


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    home = tmp_path_factory.mktemp("rehearsal")
    with (
        contextlib.closing(Cluster(home / "cluster", GPU_NODE)) as cluster,
        contextlib.closing(Laptop(cluster, home / "laptop", engine=False)) as laptop,
    ):
        save_checkpoints(laptop.directory)
        laptop.type("source .venv/bin/activate\n")
        reader = Reader(cluster, laptop)
        reader.follow_guide()
        reader.upgrade()
        yield reader


def save_checkpoints(directory: Path) -> None:
    """What the reader has: a base model, and two checkpoints of which the second is not whole."""
    base = parts.save_base(directory / "my-base", tied=True)
    for name, strength in (("my-checkpoint", 0.2), ("my-checkpoint-2", 0.3)):
        parts.mark_qlora(parts.save_adapter(base, directory / name, strength=strength))
    (directory / "my-checkpoint-2" / WEIGHTS).rename(directory / WEIGHTS)


@dataclass
class Reader:
    """What the commands printed, by their heading; which revisions answered, and the server's image, after a step."""

    cluster: Cluster
    laptop: Laptop
    printed: dict[str, str] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=dict)
    images: dict[str, str] = field(default_factory=dict)

    def follow_guide(self) -> None:
        for block in shell_blocks(GUIDE):
            if block.heading.startswith("8."):
                return
            if block.heading.startswith("6."):
                self.cluster.objects.apply(OTHER_NAMESPACE)
                self.laptop.type(f"export KEY={self.key()}\n")
            if "kubectl apply -k my-next" in block.code:
                self.revisions["first"] = self.revision()
                self.convert_next(block.code)
            else:
                self.printed[block.heading] = self.printed.get(block.heading, "") + self.laptop.type(block.code)
        raise AssertionError("the guide ended before its step 8")

    def convert_next(self, code: str) -> None:
        """A conversion that fails, because its checkpoint is not whole, and is applied again."""
        (load,) = [block.code for block in shell_blocks(GUIDE) if block.heading.startswith("4.")]
        load = load.replace("my-checkpoint", "my-checkpoint-2")
        self.laptop.type(load)
        self.printed["failed"] = self.laptop.type(code, fails=True)
        self.revisions["failed"] = self.revision()
        (self.laptop.directory / WEIGHTS).rename(self.laptop.directory / "my-checkpoint-2" / WEIGHTS)
        remove = "kubectl -n graft exec graft-loader -- rm -r /srv/graft/checkpoints/my-checkpoint"
        assert remove in GUIDE.read_text()
        self.laptop.type(load.replace("kubectl -n graft cp", f"{remove}-2\nkubectl -n graft cp", 1))
        again = code[code.index("kubectl apply") :]
        self.printed["again"] = self.laptop.type(f"kubectl -n graft delete {NEXT_JOB}\n{again}")
        self.revisions["second"] = self.revision()

    def upgrade(self) -> None:
        self.revisions["rolled back"] = self.revision()
        image = "your.registry/graft-serve:0.2.0"
        self.laptop.type(f"docker build --target serve-cuda -t {image} .\ndocker push {image}\n")
        for block in shell_blocks(HOW_TO / "upgrade.md"):
            if not block.heading.startswith(("2.", "3.")):
                continue
            self.laptop.type(block.code)
            self.laptop.type("kubectl -n graft rollout status deployment/graft --timeout=15m\n")
            path = "{.spec.template.spec.containers[0].image}"
            self.images[block.heading] = self.laptop.type(
                f"kubectl -n graft get deployment graft -o jsonpath='{path}'\n"
            )
            self.revisions[block.heading] = self.revision()

    def revision(self) -> str:
        """That which answers."""
        name, _, digest = documents_in(self.laptop.type(ASK))[-1]["model"].partition("@")
        assert name == "support"
        return str(digest)

    def key(self) -> str:
        output = self.printed["3. Create the namespace and the secrets"]
        match = re.search(r"^graft-\S{30,}$", output, flags=re.MULTILINE)
        assert match, output
        return match[0]


def test_the_guide_leads_to_an_answer(rehearsal: Reader) -> None:
    (answer,) = [document for document in documents_in(rehearsal.printed["6. Send a request"]) if "choices" in document]

    assert answer["model"].startswith("support@")


def test_a_finished_conversion_is_kept_when_its_job_is_applied_again(rehearsal: Reader) -> None:
    printed = rehearsal.printed["5. Convert the first checkpoint"]

    assert printed.count("job/graft-convert-base created") == 2


def test_a_conversion_that_fails_says_why_and_publishes_nothing(rehearsal: Reader) -> None:
    assert "checkpoint_unreadable" in rehearsal.printed["failed"]
    assert rehearsal.revisions["failed"] == rehearsal.revisions["first"]


def test_its_job_applied_again_publishes_the_next_revision(rehearsal: Reader) -> None:
    assert rehearsal.revisions["second"] != rehearsal.revisions["first"]
    assert rehearsal.revisions["second"] in rehearsal.printed["again"]


def test_a_rollback_brings_back_the_revision_before(rehearsal: Reader) -> None:
    assert rehearsal.revisions["rolled back"] == rehearsal.revisions["first"]


@pytest.mark.parametrize(("step", "tag"), [("2. Apply a new image", "0.2.0"), ("3. Roll back", "0.1.0")])
def test_an_upgrade_and_the_way_back_keep_what_was_served(rehearsal: Reader, step: str, tag: str) -> None:
    assert rehearsal.images[step] == f"your.registry/graft-serve:{tag}"
    assert rehearsal.revisions[step] == rehearsal.revisions["rolled back"]
