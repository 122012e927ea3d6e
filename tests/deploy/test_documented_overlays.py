"""Overlays as the documentation has its readers write them: what a page's commands make, kubectl renders as it says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import pytest
import yaml

from tests.deploy.manifests import DEPLOY, ROOT, Document, containers, needs_kubectl, only, pod_templates, rendered
from tests.deploy.rehearsal.documentation import code_blocks
from tests.deploy.rehearsal.node.resources import LAPTOP, Resources, requests

pytestmark = needs_kubectl

PAGE = ROOT / "docs" / "how-to" / "deploy-on-kubernetes.md"
Render = Callable[[str], tuple[Document, ...]]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which a reader has written what the page says, with a kubectl that applies nothing."""
    home = tmp_path_factory.mktemp("reader")
    shutil.copytree(DEPLOY, home / "deploy")
    (home / "bin").mkdir()
    kubectl = shutil.which("kubectl")
    (home / "bin" / "kubectl").write_text(f'#!/bin/sh\n[ "$1" != kustomize ] || exec {kubectl} "$@"\n')
    for name in ("python", "docker"):
        (home / "bin" / name).write_text("#!/bin/sh\n")
    for program in (home / "bin").iterdir():
        program.chmod(0o755)
    (home / "keys.json").write_text('{"keys": []}')
    for block in code_blocks(PAGE):
        if block.language == "bash" and ("<<EOF" in block.code):
            subprocess.run(
                ["bash", "-euc", block.code],
                cwd=home,
                env=os.environ | {"PATH": f"{home / 'bin'}:{os.environ['PATH']}"},
                check=True,
                capture_output=True,
            )
    return home


def render(directory: Path) -> tuple[Document, ...]:
    result = subprocess.run(["kubectl", "kustomize", str(directory)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return tuple(yaml.safe_load_all(result.stdout))


def mounted(documents: tuple[Document, ...], kind: str) -> set[str]:
    """Names of the ConfigMaps or Secrets that pods mount."""
    volumes = [
        volume
        for document in documents
        for _, template in pod_templates(document)
        for volume in template["spec"]["volumes"]
    ]
    if kind == "ConfigMap":
        return {volume["configMap"]["name"] for volume in volumes if "configMap" in volume}
    return {volume["secret"]["secretName"] for volume in volumes if "secret" in volume}


def test_an_overlay_of_ones_own_replaces_adapters_yaml_under_the_name_that_pods_mount(written: Path) -> None:
    documents = render(written / "my-graft")
    adapters = only(documents, "ConfigMap", "graft-adapters")

    assert yaml.safe_load(adapters["data"]["adapters.yaml"])["adapters"] == [{"artifact": "/srv/graft/artifacts/base"}]
    assert adapters["metadata"]["name"] in mounted(documents, "ConfigMap")


def test_the_keys_are_a_secret_of_the_overlay_under_the_name_that_pods_mount(written: Path) -> None:
    documents = render(written / "my-graft")
    keys = only(documents, "Secret", "graft-keys")

    assert set(keys["data"]) == {"keys.json"}
    assert keys["metadata"]["name"] in mounted(documents, "Secret")


def test_the_images_are_those_that_the_page_builds(written: Path) -> None:
    built = {word for block in code_blocks(PAGE) for word in block.code.split() if word.startswith("your.registry/")}
    for overlay in ("my-graft", "my-conversion", "my-next"):
        for document in render(written / overlay):
            for name, template in pod_templates(document):
                for container in containers(template):
                    assert container["image"] in built, f"{name}: {container['image']}"


def test_the_next_conversion_has_all_that_its_job_asks_for(written: Path) -> None:
    documents = render(written / "my-next")
    given = only(documents, "ConfigMap", "graft-conversion-support-2")["data"]
    job = only(documents, "Job", "graft-convert-support-2")

    (template,) = [template for _, template in pod_templates(job)]
    arguments = " ".join(argument for container in containers(template) for argument in container["args"])
    assert set(re.findall(r"\$\((\w+)\)", arguments)) == set(given)


def test_a_conversion_of_ones_own_converts_what_the_page_says(written: Path) -> None:
    documents = render(written / "my-conversion")
    conversion = only(documents, "ConfigMap", "graft-conversion-base")["data"]

    assert conversion == {
        "CHECKPOINT": "my-checkpoint",
        "BASE": "/srv/graft/checkpoints/my-base",
        "ARTIFACT": "base",
        "NAME": "support",
    }


def test_prometheus_finds_what_has_the_label_of_its_release(tmp_path: Path) -> None:
    """As kube-prometheus-stack looks for it, unless it is told otherwise."""
    (fragment,) = [block.code for block in code_blocks(PAGE) if block.code.startswith("labels:")]
    overlay = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", "namespace": "graft"}
    overlay["resources"] = [os.path.relpath(DEPLOY / "overlays" / "prod", tmp_path.resolve())]
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(overlay) + fragment)
    documents = render(tmp_path)

    for kind in ("PodMonitor", "PrometheusRule"):
        assert only(documents, kind)["metadata"]["labels"]["release"] == "kube-prometheus-stack"
    before = {name: template for document in rendered("prod") for name, template in pod_templates(document)}
    after = {name: template for document in documents for name, template in pod_templates(document)}
    assert after == before, "a label for Prometheus restarts no pod"


def test_the_overlays_of_the_tutorial_convert_what_it_copies() -> None:
    page = (ROOT / "docs" / "tutorials" / "first-kubernetes-deployment.md").read_text()
    first = only(rendered("convert-base"), "ConfigMap")["data"]
    second = only(rendered("convert"), "ConfigMap")["data"]

    for place in (first["CHECKPOINT"], second["CHECKPOINT"], first["BASE"].removeprefix("/srv/graft/checkpoints/")):
        assert f"graft-loader:/srv/graft/checkpoints/{place}\n" in page


@pytest.mark.parametrize("conversion", ["convert-base", "convert"])
def test_a_laptop_has_room_for_a_conversion_beside_the_server(conversion: str) -> None:
    pods = [
        template
        for name in ("dev", conversion)
        for document in rendered(name)
        for _, template in pod_templates(document)
    ]

    asked = sum((requests(template["spec"]) for template in pods), Resources())
    assert asked.fit_in(LAPTOP), f"{asked} of {LAPTOP}"
    assert asked.cpu > Decimal(1)
