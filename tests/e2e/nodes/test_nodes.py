"""What the manifests deploy, on three nodes: it comes up, rolls to a new version, and loses a node, under load."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve.callers import key_admin
from serve.callers.keys import Key
from tests.deploy.manifests import ROOT, only, pod_templates, rendered
from tests.e2e.conftest import Story
from tests.e2e.nodes.cluster import Cluster, cluster, possible
from tests.e2e.nodes.load import CALLERS, Outcome

pytestmark = pytest.mark.skipif(possible() is not None, reason=str(possible()))

WORKERS = 2


@pytest.fixture(scope="module")
def nodes(story: Story, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The overlay dev-ray as it is, with a tiny base model on the volume."""
    home = tmp_path_factory.mktemp("nodes")
    for name, artifact in (("base", "french"), ("german", "german")):
        shutil.copytree(story.artifacts[artifact], home / "artifacts" / name)
    with cluster(home, WORKERS) as nodes:
        (home / "admin" / "admin.token").write_text("the operator's token")
        secret = key_admin.create(home / "keys" / "keys.json", lambda secrets: Key(id="load", secrets=secrets))
        (home / "key").write_text(secret)
        (home / "settings" / "settings.yaml").write_text(settings())
        nodes.deploy(serve_config())
        nodes.wait_until_running(WORKERS)
        publish(nodes, "base", "--name", "french")
        yield nodes


def serve_config() -> str:
    text: str = only(rendered("dev-ray"), "RayService")["spec"]["serveConfigV2"]
    return text


def settings() -> str:
    text: str = only(rendered("dev-ray"), "ConfigMap", "graft-settings")["data"]["settings.yaml"]
    return text


def publish(nodes: Cluster, artifact: str, *options: str) -> None:
    """As the conversion Job does."""
    state = ("--state=/srv/graft/state/base", "--local=/tmp/graft/publisher", f"--url={nodes.url}")
    command = [sys.executable, "-m", "serve", "publish", f"/srv/graft/artifacts/{artifact}", *options, *state]
    nodes.run(0, "env", "GRAFT_ADMIN_TOKEN=the operator's token", *command)


@contextlib.contextmanager
def load(nodes: Cluster, *models: str) -> Iterator[Outcome]:
    """Callers on the head's node; the outcome is filled in at the end."""
    outcome = Outcome()
    command = [sys.executable, "-m", "tests.e2e.nodes.load", nodes.url, *models]
    process = nodes.popen(0, "env", f"GRAFT_KEY={(nodes.home / 'key').read_text()}", *command, stdout=subprocess.PIPE)
    try:
        time.sleep(5)
        yield outcome
        time.sleep(5)
    finally:
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=90)
    vars(outcome).update(json.loads(output))
    print("\n", models, outcome)


def test_every_node_but_the_head_holds_one_engine(nodes: Cluster) -> None:
    assert nodes.addresses_of_replicas() == [nodes.address(1), nodes.address(2)]


def test_every_probe_of_the_manifests_is_answered_without_a_token(nodes: Cluster) -> None:
    service = only(rendered("dev-ray"), "RayService")
    for node, (name, template) in enumerate(pod_templates(service)):
        container = template["spec"]["containers"][0]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            http_get = container[probe]["httpGet"]
            url = f"http://{nodes.address(node)}:{ports.get(http_get['port'], http_get['port'])}{http_get['path']}"
            assert nodes.run(0, "curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", url) == "200", (name, probe)


def test_ray_takes_nobody_without_its_token(nodes: Cluster) -> None:
    url = f"http://{nodes.address(0)}:8265/api/serve/applications/"

    assert nodes.run(1, "curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", url) == "401"


def test_an_adapter_is_published_to_all_nodes_under_load(nodes: Cluster) -> None:
    with load(nodes, "french", "tiny-llama") as outcome:
        publish(nodes, "german")

    assert outcome.failed == []
    assert outcome.answered > 0


def test_a_new_version_of_the_application_rolls_out_without_a_failed_request(nodes: Cluster) -> None:
    (nodes.home / "settings" / "settings-2.yaml").write_text(settings() + "keep_previous: 2\n")
    config = serve_config().replace("settings/settings.yaml", "settings/settings-2.yaml")
    before = nodes.replica_ids()

    with load(nodes, "french", "german", "tiny-llama") as outcome:
        nodes.deploy(config)
        nodes.wait_until_running(WORKERS, besides=before)

    assert outcome.failed == []
    assert outcome.answered > 0


def test_a_pod_that_is_deleted_drains_its_node_first(nodes: Cluster) -> None:
    """As its preStop does, with no room for a replacement anywhere."""
    with load(nodes, "french", "tiny-llama") as outcome:
        nodes.run(2, sys.executable, ROOT / "deploy" / "image" / "drain_node.py", "60")
        assert nodes.addresses_of_replicas() == [nodes.address(1)]
        nodes.kill(2)
        time.sleep(10)

    assert outcome.failed == []
    nodes.start(2)
    nodes.wait_until_running(WORKERS)


def test_a_node_that_dies_costs_only_what_ran_on_it(nodes: Cluster) -> None:
    with load(nodes, "french", "tiny-llama") as outcome:
        nodes.kill(2)
        time.sleep(30)  # noticed, and gone from every proxy

    # Each caller has one request at a time; at most those on the dead node are lost, and told.
    assert len(outcome.failed) <= CALLERS
    assert all(request["stream"] for request in outcome.failed), outcome.failed
    assert outcome.answered > 0


def test_the_node_comes_back_and_serves_again(nodes: Cluster) -> None:
    with load(nodes, "french", "tiny-llama") as outcome:
        nodes.start(2)
        nodes.wait_until_running(WORKERS)

    assert outcome.failed == []


def test_more_requests_than_wanted_ask_for_more_replicas(nodes: Cluster) -> None:
    """The configuration of prod, then with a target that these few callers exceed; there is no room for a third."""
    text: str = only(rendered("prod"), "RayService")["spec"]["serveConfigV2"]
    prod = re.sub("settings_file: .*", f"settings_file: {nodes.settings_file()}", text)
    low = re.sub("target_ongoing_requests: .*", "target_ongoing_requests: 1", prod)
    low = re.sub("upscale_delay_s: .*", "upscale_delay_s: 1", low)
    fixed = nodes.replica_ids()
    nodes.deploy(prod)  # to Ray Serve a new version: it was not scaled before
    nodes.wait_until_running(WORKERS, besides=fixed)
    before = nodes.replica_ids()

    with load(nodes, "french", "tiny-llama") as outcome:
        nodes.deploy(low)
        wanted = nodes.wait_until_wanted(more_than=WORKERS)

    assert wanted <= 8
    assert before <= nodes.replica_ids()
    assert outcome.failed == []


def test_what_a_node_writes_stays_on_it(nodes: Cluster) -> None:
    assert list(Path("/tmp/graft").iterdir()) == []
    for node in range(WORKERS + 1):
        assert list((nodes.home / f"node-{node}" / "graft" / "haproxy").rglob("haproxy.cfg")), node
