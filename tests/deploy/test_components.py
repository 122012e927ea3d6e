"""A component does what it says on every overlay that deploy/README.md names for it; elsewhere rendering fails."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import combinations

import pytest
import yaml

from tests.deploy.manifests import (
    DEPLOY,
    Document,
    RenderingFailed,
    containers,
    missing,
    needs_kubectl,
    only,
    pod_templates,
    rendered,
    rendered_copy,
    rendered_with,
    validate,
)
from tests.deploy.test_commands import PROGRAMS, parsed

pytestmark = needs_kubectl

Documents = tuple[Document, ...]
ONE_MACHINE, RAY, SECOND = ("dev", "single-gpu"), ("dev-ray", "prod"), ("second-base",)
OVERLAYS = (*ONE_MACHINE, *RAY, *SECOND)
README = (DEPLOY / "README.md").read_text()


def table() -> dict[str, dict[str, str]]:
    """Component → overlay → yes, no, or a word on why it is not for it."""
    rows = re.findall(r"^\| `([a-z-]+)` \| (.+) \|$", README.partition("## Which component goes with which")[2], re.M)
    overlays_of = {}
    for component, cells in rows:
        one, ray, second = (cell.strip() for cell in cells.split("|")[:3])
        kinds = ((ONE_MACHINE, one), (RAY, ray), (SECOND, second))
        overlays_of[component] = {overlay: cell for overlays, cell in kinds for overlay in overlays}
    return overlays_of


TABLE = table()
SAID = [(component, overlay, said) for component, overlays in TABLE.items() for overlay, said in overlays.items()]
WORK = [(component, overlay) for component, overlay, said in SAID if said == "yes"]
REFUSED = [(component, overlay) for component, overlay, said in SAID if said == "refused"]


def servers(documents: Documents) -> list[Document]:
    """The pods with an engine, and Ray's head."""
    return [
        template
        for document in documents
        for name, template in pod_templates(document)
        if document["kind"] == "RayService" or name in ("Deployment/graft", "Deployment/graft-2")
    ]


def settings(documents: Documents) -> Document:
    text = only(documents, "ConfigMap", "graft-settings(-2)?")["data"]["settings.yaml"]
    return dict(yaml.safe_load(text))


def is_ray(documents: Documents) -> bool:
    return any(document["kind"] == "RayService" for document in documents)


def scales(documents: Documents) -> None:
    cluster = only(documents, "RayService")["spec"]["rayClusterConfig"]
    assert cluster["enableInTreeAutoscaling"]
    assert cluster["workerGroupSpecs"][0]["maxReplicas"] == 8


def leads_to_its_own_server(documents: Documents) -> None:
    route, gateway = only(documents, "HTTPRoute")["spec"], only(documents, "Gateway")
    assert [parent["name"] for parent in route["parentRefs"]] == [gateway["metadata"]["name"]]
    names = [document["metadata"]["name"] for document in documents if document["kind"] == "Service"]
    if is_ray(documents):
        names.append(only(documents, "RayService")["spec"]["serveService"]["metadata"]["name"])
    assert {each["name"] for rule in route["rules"] for each in rule["backendRefs"]} <= set(names)
    admitted = only(documents, "NetworkPolicy", "graft-edge(-2)?")["spec"]["ingress"][0]["from"][0]
    assert admitted["podSelector"]["matchExpressions"][0]["values"] == [gateway["metadata"]["name"]]


def shows_dashboards(documents: Documents) -> None:
    assert only(documents, "PrometheusRule")
    labels = [each["metadata"].get("labels", {}) for each in documents if each["kind"] == "ConfigMap"]
    assert any("grafana_dashboard" in each for each in labels)


def upgrades_in_steps(documents: Documents) -> None:
    assert only(documents, "RayService")["spec"]["upgradeStrategy"]["type"] == "NewClusterWithIncrementalUpgrade"


def shows_metrics(documents: Documents) -> None:
    """Of every pod with an engine, from the directory that its replicas write to."""
    with_engine = servers(documents)[-1]
    ported = [
        container
        for container in containers(with_engine)
        if "graft-metrics" in {port["name"] for port in container.get("ports", [])}
    ]
    assert len(ported) == 1
    options = parsed("graft-serve", ported[0]["args"])
    if not is_ray(documents):
        assert options["metrics_host"] == "0.0.0.0"
        return
    directory = settings(documents)["metrics"]["directory"]
    assert (str(options["directory"]), options["host"]) == (directory, "0.0.0.0")
    engine = with_engine["spec"]["containers"][0]
    for container in (engine, ported[0]):
        assert directory in {mount["mountPath"] for mount in container["volumeMounts"]}, container["name"]


def keeps_its_state_in_the_bucket(documents: Documents) -> None:
    place = only(documents, "ConfigMap", "graft-state-place(-2)?")
    for document in documents:
        for name, template in pod_templates(document):
            claims = [volume.get("persistentVolumeClaim", {}) for volume in template["spec"]["volumes"]]
            assert "graft-state" not in {claim.get("claimName") for claim in claims}, name
    followers = [each["spec"]["template"] for each in documents if "follower" in each["metadata"]["name"]]
    for template in (*servers(documents), *followers):
        container = template["spec"]["containers"][0]
        sources = container["envFrom"]
        assert place["metadata"]["name"] in [source.get("configMapRef", {}).get("name") for source in sources]
        secrets = [source["secretRef"] for source in sources if "secretRef" in source]
        assert secrets == [{"name": "graft-object-store", "optional": True}], "a role of the cloud may take its place"
        if "args" in container:
            options = parsed("graft-serve", container["args"])
            assert (options["state"], options["local"] is None) == ("$(STATE_URL)", False)
    if is_ray(documents):
        assert "state_url" not in settings(documents)


def survives_its_head(documents: Documents) -> None:
    options = only(documents, "RayService")["spec"]["rayClusterConfig"]["gcsFaultToleranceOptions"]
    assert options["redisAddress"] == "graft-redis:6379"
    assert {each["metadata"]["name"] for each in documents if "redis" in each["metadata"]["name"]} <= {"graft-redis"}


def lets_traces_out(documents: Documents) -> None:
    ports = [rule["ports"] for rule in only(documents, "NetworkPolicy", "graft-tracing")["spec"]["egress"]]
    assert ports == [[{"port": 4318, "protocol": "TCP"}]]


def leaves_users_to_the_cluster(documents: Documents) -> None:
    for document in documents:
        for name, template in pod_templates(document):
            contexts = [template["spec"], *containers(template)]
            said = {key for each in contexts for key in each["securityContext"]}
            assert not said & {"runAsUser", "runAsGroup", "fsGroup", "supplementalGroups"}, name


DOES: dict[str, Callable[[Documents], None]] = {
    "autoscaling": scales,
    "gateway-api": leads_to_its_own_server,
    "grafana": shows_dashboards,
    "incremental-upgrade": upgrades_in_steps,
    "monitoring": shows_metrics,
    "object-store": keeps_its_state_in_the_bucket,
    "openshift": leaves_users_to_the_cluster,
    "redis": survives_its_head,
    "tracing": lets_traces_out,
}


def check(documents: Documents, overlay: str) -> None:
    """What holds whatever the components."""
    wrong = {each["metadata"]["name"]: errors for each in documents if (errors := validate(each))}
    assert wrong == {}
    # A second base uses the volumes of the first, which has its state in a volume or in a bucket.
    first = (*rendered("dev-ray"), *rendered("prod")) if overlay in SECOND else ()
    assert missing(documents, first) == {}
    for document in documents:
        for name, template in pod_templates(document):
            assert template["spec"]["securityContext"]["runAsNonRoot"] is True, name
            for container in containers(template):
                program = container["image"].rpartition("/")[2].partition(":")[0]
                if program in PROGRAMS and "args" in container:
                    parsed(program, container["args"])


def test_every_component_is_in_the_table_and_has_its_test() -> None:
    there = {path.name for path in (DEPLOY / "components").iterdir()}

    assert set(TABLE) == set(DOES) == {name for name in there if not name.startswith("convert-")}


@pytest.mark.parametrize(("component", "overlay"), WORK)
def test_a_component_in_a_copy_of_an_overlay_does_what_it_says(component: str, overlay: str) -> None:
    documents = rendered_copy(overlay, component) if has_to_add(component, overlay) else rendered(overlay)

    DOES[component](documents)
    check(documents, overlay)


def has_to_add(component: str, overlay: str) -> bool:
    return f"../../components/{component}\n" not in (DEPLOY / "overlays" / overlay / "kustomization.yaml").read_text()


@pytest.mark.parametrize(("component", "overlay"), [way for way in WORK if way[1] not in SECOND and has_to_add(*way)])
def test_a_component_above_an_overlay_does_what_it_says(component: str, overlay: str) -> None:
    if component == "object-store":
        pytest.skip("it needs a ConfigMap beside it, as in a copy")

    DOES[component](rendered_with(overlay, component))


@pytest.mark.parametrize(("component", "overlay"), REFUSED)
def test_a_component_that_could_do_nothing_ends_the_rendering(component: str, overlay: str) -> None:
    with pytest.raises(
        RenderingFailed, match=r"no resource matches strategic merge patch|already registered id: Service"
    ):
        rendered_copy(overlay, component)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_all_components_together_still_do_what_each_says(overlay: str) -> None:
    """In the order of the table: openshift last."""
    named = [component for component in TABLE if (component, overlay) in WORK]
    documents = rendered_copy(overlay, *(component for component in named if has_to_add(component, overlay)))

    for component in named:
        DOES[component](documents)
    check(documents, overlay)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_any_two_components_still_do_what_each_says(overlay: str) -> None:
    named = [component for component in TABLE if (component, overlay) in WORK and has_to_add(component, overlay)]
    for pair in combinations(named, 2):
        documents = rendered_copy(overlay, *pair)
        for component in pair:
            DOES[component](documents)


@pytest.mark.parametrize("overlay", ["checkpoints", "convert", "convert-base", "convert-prod"])
def test_a_conversion_runs_as_a_user_of_openshift(overlay: str) -> None:
    documents = rendered_copy(overlay, "openshift")

    leaves_users_to_the_cluster(documents)
    assert {each["metadata"]["name"]: errors for each in documents if (errors := validate(each))} == {}
