"""What the pods run are commands that Graft's programs accept, on files that the pods have."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import typer.main

import convert.cli.app
import serve.cli.app
from tests.deploy.manifests import OVERLAYS, SERVING, Document, containers, needs_kubectl, pod_templates, rendered

pytestmark = needs_kubectl

PROGRAMS = {"graft-convert": convert.cli.app.app, "graft-serve": serve.cli.app.app}


def commands(overlay: str) -> Iterator[tuple[str, Document, Any]]:
    """Every container that runs one of Graft's commands: its name, the container, and its command as parsed.

    The pods of a RayService have none: KubeRay gives them theirs.
    """
    for document in rendered(overlay):
        for pod, template in pod_templates(document):
            for container in containers(template):
                program = container["image"].rpartition("/")[2].partition(":")[0]
                if program in PROGRAMS and "args" in container:
                    yield f"{pod} {container['name']}", container, parsed(program, container["args"])


def parsed(program: str, arguments: list[str]) -> Any:
    """Raises click's UsageError if the program does not accept the arguments."""
    group: Any = typer.main.get_command(PROGRAMS[program])
    return group.commands[arguments[0]].make_context(arguments[0], arguments[1:]).params


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_programs_accept_what_the_pods_run_them_with(overlay: str) -> None:
    for name, container, _ in commands(overlay):
        mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
        for path in re.findall(r"/srv/graft/[^\s,$]*", " ".join(container["args"])):
            assert any(path.startswith(mount) for mount in mounts), f"{name}: {path} is not mounted"


@pytest.mark.parametrize("overlay", SERVING)
def test_a_server_that_other_machines_reach_knows_who_may_call(overlay: str) -> None:
    for name, _, options in commands(overlay):
        if options.get("host") == "0.0.0.0" and "keys_file" in options:
            assert options["keys_file"] or options["oidc_file"] or options["open_to_all"], name


@pytest.mark.parametrize("overlay", SERVING)
def test_a_server_waits_in_its_pod_for_the_artifact_that_it_serves(overlay: str) -> None:
    templates = [template for document in rendered(overlay) for _, template in pod_templates(document)]
    servers = [template for template in templates if any(_is_server(each) for each in template["spec"]["containers"])]

    assert servers
    for template in servers:
        assert template["spec"]["initContainers"][0]["args"][0] == "wait"


def _is_server(container: Document) -> bool:
    return container["name"] in ("ray-head", "ray-worker") or container.get("args", [""])[0] == "run"


@pytest.mark.parametrize("overlay", SERVING)
def test_a_process_beside_ray_is_started_again_when_it_ends(overlay: str) -> None:
    """KubeRay never restarts the containers of a pod. It restarts a sidecar: an init container that always restarts."""
    for document in rendered(overlay):
        for pod, template in pod_templates(document):
            if document["kind"] == "RayService":
                assert len(template["spec"]["containers"]) == 1, pod
                sidecars = [each for each in template["spec"]["initContainers"] if each["args"][0] != "wait"]
                assert all(sidecar["restartPolicy"] == "Always" for sidecar in sidecars), pod


@pytest.mark.parametrize("overlay", SERVING)
def test_a_disruption_budget_counts_pods_that_stay(overlay: str) -> None:
    """A RayCluster has no scale subresource: with `maxUnavailable` Kubernetes refuses every eviction of its pods."""
    budgets = [document["spec"] for document in rendered(overlay) if document["kind"] == "PodDisruptionBudget"]

    assert all("minAvailable" in budget and "maxUnavailable" not in budget for budget in budgets)
