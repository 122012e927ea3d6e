"""Each base answers under a Service of its own; a second one takes nothing from the first: no name, pod or caller."""

from __future__ import annotations

import re

import pytest
import yaml

from tests.deploy.manifests import Document, needs_kubectl, only, pod_templates, rendered, rendered_with
from tests.deploy.network.policies import matches

pytestmark = needs_kubectl

FIRST = ("dev-ray", "prod")


def follower(overlay: str) -> dict[str, str]:
    """The options of its command, with the variables in their place."""
    (container,) = only(rendered(overlay), "Deployment", "graft-follower(-2)?")["spec"]["template"]["spec"][
        "containers"
    ]
    values = {variable["name"]: variable.get("value", "") for variable in container["env"]}
    options = [re.sub(r"\$\((\w+)\)", lambda match: values.get(match[1], ""), each) for each in container["args"][2:]]
    return dict(option.removeprefix("--").split("=", 1) for option in options)


def service(overlay: str) -> str:
    return str(only(rendered(overlay), "RayService")["spec"]["serveService"]["metadata"]["name"])


def selectors(overlay: str) -> list[Document]:
    """Of whatever selects pods, except network policies: those are for all of Graft's."""
    documents = [each for each in rendered(overlay) if each["kind"] in ("Deployment", "PodDisruptionBudget")]
    (group,) = only(rendered(overlay), "RayService")["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    spread = group["template"]["spec"]["topologySpreadConstraints"]
    return [*(each["spec"]["selector"] for each in documents), *(each["labelSelector"] for each in spread)]


def labels(overlay: str) -> list[dict[str, str]]:
    """Of each pod; KubeRay adds what it is in its cluster."""
    return [
        template["metadata"]["labels"] | {"ray.io/node-type": "worker"}
        for document in rendered(overlay)
        if document["kind"] != "StatefulSet"
        for _, template in pod_templates(document)
    ]


@pytest.mark.parametrize("first", FIRST)
def test_it_changes_no_object_of_the_first(first: str) -> None:
    names = [{(each["kind"], each["metadata"]["name"]) for each in rendered(way)} for way in (first, "second-base")]

    assert names[0] & names[1] == set()


@pytest.mark.parametrize("first", FIRST)
def test_it_answers_under_a_service_of_its_own(first: str) -> None:
    assert service("second-base") != service(first)


def test_the_service_that_everybody_calls_is_there_where_kuberay_makes_none() -> None:
    """With an incremental upgrade KubeRay ignores `serveService`."""
    documents = rendered_with("prod", "incremental-upgrade")
    selector = {"matchLabels": only(documents, "Service", service("prod"))["spec"]["selector"]}
    pods = dict(pod_templates(only(documents, "RayService")))

    chosen = {name for name, template in pods.items() if matches(selector, template["metadata"]["labels"])}
    assert chosen == {"RayService/graft engines"}


@pytest.mark.parametrize("overlay", [*FIRST, "second-base"])
def test_a_follower_publishes_to_the_server_that_it_came_with(overlay: str) -> None:
    assert follower(overlay)["url"] == f"http://{service(overlay)}:8000"


def test_each_has_a_state_of_its_own() -> None:
    def state(overlay: str) -> str:
        return str(
            yaml.safe_load(only(rendered(overlay), "ConfigMap", "graft-settings(-2)?")["data"]["settings.yaml"])[
                "state_dir"
            ]
        )

    assert state("second-base") != state("dev-ray")
    assert follower("second-base")["state"] == state("second-base")
    assert follower("dev-ray")["state"] == state("dev-ray")


@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("turned", [False, True])
def test_nothing_of_one_selects_a_pod_of_the_other(first: str, turned: bool) -> None:
    one, other = ("second-base", first) if turned else (first, "second-base")

    for selector in selectors(one):
        assert any(matches(selector, own) for own in labels(one)), selector
        assert not any(matches(selector, strange) for strange in labels(other)), selector


def test_with_the_components_of_the_first_it_mounts_only_what_that_has() -> None:
    there = {each["metadata"]["name"] for each in rendered("prod") if each["kind"] == "PersistentVolumeClaim"}
    documents = rendered_with("second-base", "object-store")
    templates = [template for document in documents for _, template in pod_templates(document)]

    volumes = [volume for template in templates for volume in template["spec"]["volumes"]]
    claims = {volume["persistentVolumeClaim"]["claimName"] for volume in volumes if "persistentVolumeClaim" in volume}
    assert claims == there
