"""What differs between clusters; the blocks of docs/how-to/fit-your-cluster.md on the overlays that they name."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import pytest
import yaml

from serve.settings import GatewaySettings
from tests.deploy.manifests import (
    DEPLOY,
    OVERLAYS,
    ROOT,
    Document,
    containers,
    kustomize,
    needs_kubectl,
    only,
    pod_templates,
    rendered,
    validate,
)

pytestmark = needs_kubectl

PAGE = (ROOT / "docs" / "how-to" / "fit-your-cluster.md").read_text()
BLOCKS = re.findall(r"```yaml\n# (.+)\n((?:.+\n)+?)```", PAGE)
SERVING = ("dev", "single-gpu", "dev-ray", "prod")
RAY = ("dev-ray", "prod", "second-base")


def overlays_of(said: str) -> tuple[str, ...]:
    return SERVING if said == "any overlay" else tuple(said.split(", "))


def on(overlay: str, block: str) -> tuple[Document, ...]:
    """The block in an overlay of one's own above `overlay`."""
    with tempfile.TemporaryDirectory() as home:
        document = yaml.safe_load(block)
        (Path(home) / "deploy").symlink_to(DEPLOY)
        overlay_dir = Path(home) / "my-graft"
        overlay_dir.mkdir()
        document |= {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "namespace": "graft",
            "resources": [f"../deploy/overlays/{overlay}"],
        }
        (overlay_dir / "kustomization.yaml").write_text(yaml.safe_dump(document))
        return kustomize(overlay_dir)


@pytest.mark.parametrize(
    ("overlay", "block"), [(overlay, block) for said, block in BLOCKS for overlay in overlays_of(said)]
)
def test_a_documented_block_changes_the_overlay_and_stays_valid(overlay: str, block: str) -> None:
    documents = on(overlay, block)

    assert documents != rendered(overlay)
    assert {each["metadata"]["name"]: errors for each in documents if (errors := validate(each))} == {}
    for document in documents:
        for name, template in pod_templates(document):
            pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "it"}, "template": template}
            assert validate(pod) == [], name


def test_every_block_of_the_page_is_rendered() -> None:
    assert len(BLOCKS) == PAGE.count("```yaml") > 5


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_service_becomes_a_variable_of_a_pod(overlay: str) -> None:
    for document in rendered(overlay):
        for name, template in pod_templates(document):
            assert template["spec"]["enableServiceLinks"] is False, name


def test_all_pods_take_the_credentials_of_one_service_account() -> None:
    for overlay in OVERLAYS:
        for document in rendered(overlay):
            for name, template in pod_templates(document):
                assert template["spec"]["serviceAccountName"] == "graft", name


_UNITS = {"": 1.0, "m": 1e-3, "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30}


def quantity(text: object) -> float:
    number, unit = re.fullmatch(r"([\d.]+)(\w*)", str(text)).groups()  # type: ignore[union-attr]
    return float(number) * _UNITS[unit]


def requested(template: Document, resource: str) -> float:
    """By the rule of Kubernetes: sidecars run beside the containers, other init containers before them."""
    spec = template["spec"]
    of = [quantity(each["resources"]["requests"][resource]) for each in spec["containers"]]
    initial = spec.get("initContainers", [])
    sidecars = [
        quantity(each["resources"]["requests"][resource]) for each in initial if each.get("restartPolicy") == "Always"
    ]
    before = [quantity(each["resources"]["requests"][resource]) for each in initial if "restartPolicy" not in each]
    return max(sum(of) + sum(sidecars), max(before, default=0) + sum(sidecars))


# What EKS, GKE and AKS leave of a node with 8 vCPUs and 32 GB, less half a CPU and 1 GB for the pods of the cluster.
NODE = {"cpu": 7.9 - 0.5, "memory": 26.5 * 2**30 - 2**30}


@pytest.mark.parametrize("overlay", ["prod", "single-gpu"])
def test_a_pod_with_a_gpu_fits_a_node_with_eight_vcpus(overlay: str) -> None:
    pods = 0
    for document in rendered(overlay):
        for name, template in pod_templates(document):
            if any("nvidia.com/gpu" in each["resources"]["requests"] for each in containers(template)):
                pods += 1
                for resource, there in NODE.items():
                    assert requested(template, resource) <= there, (name, resource)
    assert pods == 1


def test_a_replica_asks_ray_for_no_more_than_its_pod_has() -> None:
    for overlay in RAY:
        documents = rendered(overlay)
        settings = yaml.safe_load(only(documents, "ConfigMap", "graft-settings(-2)?")["data"]["settings.yaml"])
        (group,) = only(documents, "RayService")["spec"]["rayClusterConfig"]["workerGroupSpecs"]
        limit = group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"]
        assert settings["cpus_per_replica"] <= quantity(limit), overlay


def test_the_small_ray_cluster_fits_a_laptop_with_four_cpus() -> None:
    """kind's own pods ask for 0.95 CPUs and 290 MiB, KubeRay's operator for 0.1 CPUs and 512 MiB."""
    total = {"cpu": 0.95 + 0.1, "memory": (290 + 512) * 2.0**20}
    for document in rendered("dev-ray"):
        for name, template in pod_templates(document):
            many = 2 if name.endswith(" engines") else 1
            for resource in total:
                total[resource] += many * requested(template, resource)

    assert total["cpu"] <= 4
    assert total["memory"] <= 12 * 2**30


@pytest.mark.parametrize("overlay", RAY)
def test_whatever_ends_a_replica_waits_for_the_longest_stream(overlay: str) -> None:
    documents = rendered(overlay)
    service = only(documents, "RayService")["spec"]
    settings = yaml.safe_load(only(documents, "ConfigMap", "graft-settings(-2)?")["data"]["settings.yaml"])
    (group,) = service["rayClusterConfig"]["workerGroupSpecs"]
    pod = group["template"]["spec"]
    (command,) = (each["lifecycle"]["preStop"]["exec"]["command"] for each in pod["containers"])
    longest_s = settings["gateway"].get("max_run_s", GatewaySettings.model_fields["max_run_s"].default)

    assert command[0] == "drain-node"
    assert longest_s <= settings["drain_s"] < int(command[1]) < pod["terminationGracePeriodSeconds"]
    assert longest_s < service["rayClusterDeletionDelaySeconds"]


def window_s(probe: Document) -> float:
    return float(probe["periodSeconds"] * probe["failureThreshold"])


@pytest.mark.parametrize("overlay", ["dev", "single-gpu"])
def test_a_large_model_on_a_slow_disk_has_the_time_to_load(overlay: str) -> None:
    """8B in 16 bits, read to check its digests and read to load it, at 10 MB/s; also when its engine is replaced."""
    needed_s = 2 * 16e9 / 10e6
    (container,) = only(rendered(overlay), "Deployment")["spec"]["template"]["spec"]["containers"]

    assert window_s(container["startupProbe"]) >= needed_s
    assert window_s(container["livenessProbe"]) >= needed_s


@pytest.mark.parametrize("overlay", RAY)
def test_the_probes_of_a_head_see_the_gcs_and_those_of_a_worker_their_ray_node(overlay: str) -> None:
    pods = {
        name.rpartition(" ")[2]: template for name, template in pod_templates(only(rendered(overlay), "RayService"))
    }
    (head,), (worker,) = (pods[name]["spec"]["containers"] for name in ("head", "engines"))

    ports = {port["name"]: port["containerPort"] for port in head["ports"]}
    for probe in ("readinessProbe", "livenessProbe"):
        asked = head[probe]["httpGet"]
        assert (asked["path"], ports[asked["port"]]) == ("/api/gcs_healthz", 8265), probe
    assert worker["livenessProbe"]["httpGet"] == {"path": "/api/local_raylet_healthz", "port": 52365}
