"""The guides for many nodes, typed word by word: `prod` with a bucket, and a second base beside the first.

Ray is not run, nor an engine: a worker's pod serves what its RayService says, from the settings that are mounted there.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import boto3
import pytest

from tests.convert import parts
from tests.deploy.manifests import ROOT
from tests.deploy.rehearsal.controllers import Cluster
from tests.deploy.rehearsal.documentation import documents_in, shell_blocks
from tests.deploy.rehearsal.laptop import Laptop
from tests.deploy.rehearsal.node.resources import Resources
from tests.deploy.rehearsal.requirements import ON_REQUEST
from tests.object_store import credentials, s3_server

pytestmark = ON_REQUEST

GUIDE = ROOT / "docs" / "how-to" / "deploy-on-kubernetes.md"
UPGRADE = ROOT / "docs" / "how-to" / "upgrade.md"
MANY_NODES = "Use many nodes and a bucket"
ROOM = Resources(Decimal(64), Decimal(256 * 2**30))
ASK = """curl localhost:{port}/v1/chat/completions -H "authorization: Bearer $KEY" \\
-H 'content-type: application/json' \\
-d '{{"model": "support", "messages": [{{"role": "user", "content": "Who are you?"}}]}}'
"""


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with contextlib.closing(Cluster(tmp_path / "cluster", ROOM)) as cluster:
        yield cluster


@pytest.fixture
def laptop(cluster: Cluster, tmp_path: Path) -> Iterator[Laptop]:
    """Of a reader who has two checkpoints, the images, the namespace and its secrets."""
    with contextlib.closing(Laptop(cluster, tmp_path / "laptop", engine=False)) as laptop:
        base = parts.save_base(laptop.directory / "my-base", tied=True)
        for name, strength in (("my-checkpoint", 0.2), ("my-checkpoint-2", 0.3)):
            parts.mark_qlora(parts.save_adapter(base, laptop.directory / name, strength=strength))
        laptop.type("source .venv/bin/activate\n")
        laptop.type(guide("1.")[0])
        key = re.search(r"^graft-\S{30,}$", laptop.type(guide("3.")[0]), flags=re.MULTILINE)
        assert key
        laptop.type(f"export KEY={key[0]}\n")
        yield laptop


def guide(heading: str, page: Path = GUIDE) -> list[str]:
    """The commands under a heading that begins like that."""
    return [block.code for block in shell_blocks(page) if block.heading.startswith(heading)]


def revision(laptop: Laptop, port: int = 8000) -> str:
    name, _, digest = documents_in(laptop.type(ASK.format(port=port)))[-1]["model"].partition("@")
    assert name == "support"
    return str(digest)


def until_published(laptop: Laptop, port: int = 8000) -> str:
    """The follower publishes while the reader waits."""
    laptop.type(
        f'for second in $(seq 120); do curl -s localhost:{port}/v1/models -H "authorization: Bearer $KEY" '
        "| grep -q support && break; sleep 1; done\n"
    )
    return revision(laptop, port)


def test_prod_with_a_bucket_publishes_from_its_file_and_by_a_job(
    cluster: Cluster, laptop: Laptop, monkeypatch: pytest.MonkeyPatch
) -> None:
    with s3_server(host=cluster.network.machine) as endpoint:
        variables = credentials(endpoint)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="my-bucket")
        (laptop.directory / "bucket.env").write_text("".join(f"{key}={value}\n" for key, value in variables.items()))
        deploy, wait, convert_next = guide(MANY_NODES)
        (load,) = guide("4.")
        laptop.type(deploy)
        laptop.type(load)
        laptop.type(guide("5.")[0])
        laptop.type(wait)
        laptop.type("kubectl -n graft port-forward svc/graft 8000 &\n")
        first = until_published(laptop)
        laptop.type(load.replace("my-checkpoint", "my-checkpoint-2"))
        printed = laptop.type(convert_next)
        second = revision(laptop)

        assert second != first
        assert second in printed
        assert boto3.client("s3").list_objects_v2(Bucket="my-bucket", Prefix="base/")["KeyCount"] > 0


def test_a_second_base_is_served_beside_the_first(cluster: Cluster, laptop: Laptop) -> None:
    parts.save_base(laptop.directory / "my-base-2", tied=True, hidden=128)
    parts.remove(laptop.directory / "my-checkpoint-2")
    parts.mark_qlora(parts.save_adapter(laptop.directory / "my-base-2", laptop.directory / "my-checkpoint-2"))
    first = guide("2.")[0].replace("overlays/single-gpu", "overlays/dev-ray")
    laptop.type(first.replace("registry.example.com/graft-serve", "localhost/graft-serve"))
    keys, adapters = guide("3.")[1], next(code for code in guide("7.") if "my-graft/adapters.yaml" in code)
    (load,) = guide("4.")
    laptop.type(keys)
    laptop.type(load)
    laptop.type(load.replace("my-checkpoint", "my-checkpoint-2").replace("my-base", "my-base-2"))
    laptop.type(guide("5.")[0])
    laptop.type(adapters)
    laptop.type("kubectl -n graft wait --for=condition=Ready --timeout=30m rayservice/graft\n")
    for commands in guide("Change the base model", UPGRADE):
        laptop.type(commands)
    for service, port in (("graft", 8000), ("graft-2", 8001)):
        laptop.type(f"kubectl -n graft port-forward svc/{service} {port}:8000 &\n")

    assert until_published(laptop, 8000) != until_published(laptop, 8001)
