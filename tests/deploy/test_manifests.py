"""What `kubectl apply -k` would send: valid, and as closed as the docs say."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from serve.deployment.app import IMPORT_PATH, deploy_config
from serve.deployment.ray_environment import SINGLE_NODE, environment
from serve.deployment.ray_replicas import DEPLOYMENT
from serve.settings import APP_NAME, ServeSettings
from tests.deploy.manifests import (
    DEPLOY,
    OVERLAYS,
    SERVING,
    Document,
    containers,
    missing,
    needs_kubectl,
    only,
    pod_templates,
    rendered,
    validate,
)

pytestmark = needs_kubectl
RAY = ("dev-ray", "prod")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_object_fits_the_schema_of_its_kind(overlay: str) -> None:
    wrong = {
        f"{document['kind']}/{document['metadata']['name']}": errors
        for document in rendered(overlay)
        if (errors := validate(document))
    }

    assert wrong == {}


@pytest.mark.parametrize("overlay", RAY)
def test_pods_of_a_rayservice_fit_the_schema_of_a_pod(overlay: str) -> None:
    service = only(rendered(overlay), "RayService")
    for name, template in pod_templates(service):
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "it"}, "template": template}
        assert validate(pod) == [], name


@pytest.mark.parametrize(
    ("change", "problem"),
    [({"replica": 3}, "replica"), ({"rayVersion": 2}, "rayVersion")],
    ids=["unknown field", "wrong type"],
)
def test_a_mistake_in_a_rayservice_is_found(change: Document, problem: str) -> None:
    service = only(rendered("dev-ray"), "RayService")
    spec = service["spec"]

    wrong = service | {"spec": spec | {"rayClusterConfig": spec["rayClusterConfig"] | change}}

    assert any(problem in error for error in validate(wrong))


def test_a_kind_without_a_schema_is_an_error() -> None:
    assert validate({"apiVersion": "example.com/v1", "kind": "Strange", "metadata": {"name": "it"}})


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_pod_keeps_the_restricted_pod_security_standard(overlay: str) -> None:
    for document in rendered(overlay):
        for name, template in pod_templates(document):
            pod = template["spec"]["securityContext"]
            assert pod["runAsNonRoot"] is True, name
            assert pod["seccompProfile"] == {"type": "RuntimeDefault"}, name
            assert "hostNetwork" not in template["spec"], name
            for container in containers(template):
                own = container["securityContext"]
                assert own["allowPrivilegeEscalation"] is False, name
                assert own["readOnlyRootFilesystem"] is True, name
                assert own["capabilities"] == {"drop": ["ALL"]}, name


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_container_says_what_it_needs(overlay: str) -> None:
    for document in rendered(overlay):
        for name, template in pod_templates(document):
            for container in containers(template):
                assert set(container["resources"]["requests"]) >= {"cpu", "memory", "ephemeral-storage"}, name
                assert "memory" in container["resources"]["limits"], name
                tag = container["image"].rpartition(":")[2]
                assert tag not in (container["image"], "latest"), name


def test_no_pod_is_restarted_while_its_engine_is_being_replaced() -> None:
    (container,) = only(rendered("dev"), "Deployment")["spec"]["template"]["spec"]["containers"]
    start, alive = container["startupProbe"], container["livenessProbe"]

    assert start["httpGet"] == alive["httpGet"], "both ask the engine"
    start_s = start["periodSeconds"] * start["failureThreshold"]
    assert alive["periodSeconds"] * alive["failureThreshold"] >= start_s, "a new engine loads for as long as the first"


# An overlay, and what is served beside it: there the overlay's pods find what it doesn't bring itself.
BESIDE = [
    *((overlay, overlay) for overlay in SERVING if overlay != "second-base"),
    *(("checkpoints", served) for served in ("dev", "single-gpu", "dev-ray", "prod")),
    ("second-base", "dev-ray"),  # beside prod it needs the components of prod
    *(("convert-base", served) for served in ("dev", "single-gpu", "dev-ray", "prod")),
    *(("convert", served) for served in ("dev", "single-gpu", "dev-ray")),
    ("convert-prod", "prod"),
]


def test_every_overlay_is_applied_beside_a_server() -> None:
    assert {overlay for overlay, _ in BESIDE} == set(OVERLAYS)


@pytest.mark.parametrize(("overlay", "served"), BESIDE)
def test_what_a_pod_mounts_is_there(overlay: str, served: str) -> None:
    assert missing(rendered(overlay), (*rendered(served), *rendered("checkpoints"))) == {}


def test_every_pod_is_one_that_the_network_policies_cover() -> None:
    for overlay in OVERLAYS:
        for document in rendered(overlay):
            for name, template in pod_templates(document):
                assert template["metadata"]["labels"]["app.kubernetes.io/part-of"] == "graft", name


def test_adapters_never_restart_a_pod_and_a_base_model_always_brings_new_ones() -> None:
    documents = rendered("dev-ray")

    assert only(documents, "ConfigMap", "graft-adapters")["metadata"]["name"] == "graft-adapters"
    settings = only(documents, "ConfigMap", "graft-settings")["metadata"]["name"]
    assert settings != "graft-settings"
    for name, template in pod_templates(only(documents, "RayService")):
        assert {"name": settings} in [volume.get("configMap") for volume in template["spec"]["volumes"]], name


@pytest.mark.parametrize("overlay", RAY)
def test_ray_starts_what_the_local_server_starts(overlay: str) -> None:
    documents = rendered(overlay)
    config = yaml.safe_load(only(documents, "RayService")["spec"]["serveConfigV2"])
    (application,) = config["applications"]

    assert config["proxy_location"] == "EveryNode"
    assert (application["name"], application["import_path"], application["route_prefix"]) == (
        APP_NAME, IMPORT_PATH, "/",
    )  # fmt: skip
    assert [deployment["name"] for deployment in application["deployments"]] == [DEPLOYMENT]


def test_autoscaling_changes_nothing_else_of_the_serve_config() -> None:
    plain, scaled = (yaml.safe_load(only(rendered(overlay), "RayService")["spec"]["serveConfigV2"]) for overlay in RAY)

    scaled["applications"][0]["deployments"] = plain["applications"][0]["deployments"]
    assert scaled == plain


def test_replicas_and_nodes_scale_within_the_same_bounds() -> None:
    documents = rendered("prod")
    service = only(documents, "RayService")
    (group,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    (deployment,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"][0]["deployments"]
    bounds = deployment["autoscaling_config"]
    settings = yaml.safe_load(only(documents, "ConfigMap", "graft-settings")["data"]["settings.yaml"])

    assert (bounds["min_replicas"], bounds["max_replicas"]) == (group["minReplicas"], group["maxReplicas"])
    assert settings["replicas"] == bounds["min_replicas"]


def test_pods_run_with_the_environment_of_the_local_server(tmp_path: Path) -> None:
    settings = ServeSettings.model_validate(plain_settings(tmp_path))
    local = environment(Path("/tmp/graft"), settings)
    # Of one machine only, or made by KubeRay, or left to the limits of the pod.
    for name in ("GRAFT_POOLS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "VLLM_HOST_IP", "OMP_NUM_THREADS", *SINGLE_NODE):
        del local[name]
    for name in [key for key in local if key.endswith("_PORT")]:
        del local[name]  # free ports there, the default ones in a pod of its own
    # Where the image has them.
    local |= {
        "RAY_SERVE_HAPROXY_BINARY_PATH": "/opt/graft/bin/graft-haproxy",
        "GRAFT_HAPROXY": "/opt/graft/bin/haproxy",
        # Of the component for monitoring; where it is missing the directory can't be made, and nothing is told.
        "GRAFT_METRICS": "/srv/graft/metrics",
    }

    for overlay in RAY:
        documents = rendered(overlay)
        ray = only(documents, "ConfigMap", "graft-ray")
        assert ray["data"] == local
        for name, template in pod_templates(only(documents, "RayService")):
            sources = template["spec"]["containers"][0]["envFrom"]
            assert {"configMapRef": {"name": ray["metadata"]["name"]}} in sources, name


def plain_settings(home: Path) -> dict[str, object]:
    return {
        "engine": {"model_path": str(home), "model_name": "base", "fingerprint": "b" * 64},
        "gateway": {"admin_tokens": {"admin": "a" * 64}},
        "state_dir": str(home),
    }


def test_ray_accepts_the_serve_config(tmp_path: Path) -> None:
    from ray.serve.schema import ServeDeploySchema

    for overlay in RAY:
        ServeDeploySchema.model_validate(yaml.safe_load(only(rendered(overlay), "RayService")["spec"]["serveConfigV2"]))
    ServeDeploySchema.model_validate(deploy_config([ServeSettings.model_validate(plain_settings(tmp_path))]))


def test_the_bucket_is_named_once_for_servers_and_publishers() -> None:
    documents = rendered("prod")
    settings = yaml.safe_load(only(documents, "ConfigMap", "graft-settings")["data"]["settings.yaml"])

    place = only(documents, "ConfigMap", "graft-state-place")

    assert "state_url" not in settings
    for name, template in pod_templates(only(documents, "RayService")):
        source = {"prefix": "GRAFT_", "configMapRef": {"name": place["metadata"]["name"]}}
        assert source in template["spec"]["containers"][0]["envFrom"], name
    (follower,) = only(documents, "Deployment", "graft-follower")["spec"]["template"]["spec"]["containers"]
    assert {"configMapRef": {"name": place["metadata"]["name"]}} in follower["envFrom"]
    assert "--state=$(STATE_URL)" in follower["args"]


def test_the_autoscaler_may_ask_kubernetes_and_nobody_else() -> None:
    for overlay in OVERLAYS:
        for document in rendered(overlay):
            for name, template in pod_templates(document):
                asks = template["spec"]["automountServiceAccountToken"]
                assert asks == (overlay == "prod" and name.endswith(" head")), name


def test_folders_are_named_in_the_readme() -> None:
    readme = (DEPLOY / "README.md").read_text()

    for folder in ("base", "components", "overlays"):
        for path in (DEPLOY / folder).iterdir():
            assert f"`{folder}/{path.name}`" in readme
