"""Who must reach whom, and who must not, by the network policies of each way to deploy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from tests.deploy.manifests import Document, needs_kubectl, pod_templates, rendered_with
from tests.deploy.network.policies import Address, Connection, Peer, Pod, allowed

pytestmark = needs_kubectl

NAMESPACE = "graft"
ONE_MACHINE, RAY, CONVERSION = ("dev",), ("dev-ray",), ("convert",)
PROD = ("prod",)
OPERATOR_PORTS = (8000, 8265, 52365)

# What is not Graft's. A Service's address is translated before a policy sees the connection.
OPERATOR_BY_HELM = Pod(
    "kuberay", {"app.kubernetes.io/name": "kuberay-operator", "app.kubernetes.io/component": "kuberay-operator"}
)
OPERATOR_BY_KUSTOMIZE = Pod(
    "ray-system", {"app.kubernetes.io/name": "kuberay", "app.kubernetes.io/component": "kuberay-operator"}
)
RAY_POD_OF_ANOTHER = Pod("other", {"app.kubernetes.io/name": "kuberay", "ray.io/node-type": "worker"})
CLIENT = Pod("apps", {"app": "chat"}, {"graft-client": "true"})
UNKNOWN_POD = Pod("other", {"app": "chat"})
UNKNOWN_POD_IN_OUR_NAMESPACE = Pod(NAMESPACE, {"app": "chat"})
SERVER = Pod(NAMESPACE, {"app.kubernetes.io/name": "graft", "app.kubernetes.io/part-of": "graft"})
EDGE = Pod(NAMESPACE, {"gateway.networking.k8s.io/gateway-name": "graft-edge", "app": "istio"})
EDGE_BY_KUBERAY = Pod(NAMESPACE, {"gateway.networking.k8s.io/gateway-name": "graft-gateway"})
PROMETHEUS = Pod("monitoring", {"app.kubernetes.io/name": "prometheus"})
COLLECTOR = Pod("observability", {"app.kubernetes.io/name": "opentelemetry-collector"})
MINIO = Pod("minio", {"app": "minio"})
KUBE_DNS = Pod("kube-system", {"k8s-app": "kube-dns"})
OPENSHIFT_DNS = Pod("openshift-dns", {"dns.operator.openshift.io/daemonset-dns": "default"})
NODE_LOCAL_DNS, GKE_CLOUD_DNS = Address("169.254.20.10"), Address("169.254.169.254")
API_SERVER, INTERNET = Address("203.0.113.6"), Address("198.51.100.7")


def our(documents: tuple[Document, ...], component: str) -> Pod:
    """Graft's pod with that label `app.kubernetes.io/component`."""
    for document in documents:
        for _, template in pod_templates(document):
            labels = template["metadata"]["labels"]
            if component in (labels.get("app.kubernetes.io/component"), labels["app.kubernetes.io/name"]):
                return Pod(NAMESPACE, labels)
    raise AssertionError(f"no pod is a {component}")


@dataclass(frozen=True)
class Row:
    """A name is one of Graft's pods, by its component."""

    way: tuple[str, ...]  # an overlay, and components that are added to it
    source: Peer | str
    destination: Peer | str
    port: int
    protocol: str = "TCP"

    def __str__(self) -> str:
        ends = (end if isinstance(end, str) else _describe(end) for end in (self.source, self.destination))
        return f"{'+'.join(self.way)}: {' -> '.join(ends)}:{self.port}/{self.protocol}"


def _describe(peer: Peer) -> str:
    return peer.ip if isinstance(peer, Address) else f"{peer.namespace}/{next(iter(peer.labels.values()))}"


def holds(row: Row) -> bool:
    documents = rendered_with(row.way[0], *row.way[1:])
    source, destination = (
        our(documents, end) if isinstance(end, str) else end for end in (row.source, row.destination)
    )
    return allowed(policies_of(documents, row.way), Connection(source, destination, row.port, row.protocol))


def policies_of(documents: Sequence[Document], way: tuple[str, ...]) -> list[Document]:
    """A conversion brings no policies: those of the server that it is beside hold for it."""
    beside = rendered_with("dev") if way[0] == "convert" else ()
    return [document for document in (*documents, *beside) if document["kind"] == "NetworkPolicy"]


def name_lookups(way: tuple[str, ...], source: str) -> list[Row]:
    servers: list[tuple[Peer, int]] = [(KUBE_DNS, 53), (NODE_LOCAL_DNS, 53), (GKE_CLOUD_DNS, 53), (OPENSHIFT_DNS, 5353)]
    return [Row(way, source, server, port, protocol) for server, port in servers for protocol in ("UDP", "TCP")]


NEEDED = [
    # callers
    *(Row(way, CLIENT, server, 8000) for way, server in ((ONE_MACHINE, "server"), (RAY, "engines"), (PROD, "engines"))),
    Row(PROD, EDGE, "engines", 8000),
    Row((*ONE_MACHINE, "gateway-api"), EDGE, "server", 8000),
    # the operator
    *(
        Row(RAY, operator, node, port)
        for operator in (OPERATOR_BY_HELM, OPERATOR_BY_KUSTOMIZE)
        for node in ("head", "engines")
        for port in OPERATOR_PORTS
    ),
    # Ray: GCS, dashboard, the replicas' own ports, object manager
    *(Row(RAY, "engines", "head", port) for port in (6379, 8265, 10002)),
    *(Row(RAY, "head", "engines", port) for port in (8000, 30000, 52365)),
    Row(RAY, "engines", "engines", 30001),
    Row(RAY, "follower", "engines", 8000),
    *(Row((*RAY, "autoscaling"), "head", API_SERVER, port) for port in (443, 6443)),
    *(Row(PROD, "head", API_SERVER, port) for port in (443, 6443)),
    *(Row((*RAY, "redis"), node, "graft-redis", 6379) for node in ("head", "engines")),
    # names
    *name_lookups(ONE_MACHINE, "server"), *name_lookups(RAY, "follower"), *name_lookups(PROD, "head"),
    # publishing
    Row(CONVERSION, "graft-convert", SERVER, 8000),
    # object stores: S3 and its like, MinIO in the cluster and outside, and roles instead of keys
    *(Row(PROD, pod, INTERNET, port) for pod in ("engines", "follower") for port in (443, 9000)),
    Row(PROD, "engines", MINIO, 9000),
    *(Row((*ONE_MACHINE, "object-store"), "server", peer, port) for peer, port in ((INTERNET, 443), (MINIO, 9000))),
    *(Row(PROD, "engines", Address(ip), port) for ip, port in (
        ("169.254.169.254", 80), ("169.254.169.252", 988), ("169.254.170.23", 80),
    )),
    # observability
    Row((*ONE_MACHINE, "monitoring"), PROMETHEUS, "server", 9464),
    Row(PROD, PROMETHEUS, "engines", 9464),
    *(Row((*ONE_MACHINE, "tracing"), "server", collector, 4318) for collector in (COLLECTOR, INTERNET)),
    *(Row((*PROD, "tracing"), "engines", collector, 4318) for collector in (COLLECTOR, INTERNET)),
]  # fmt: skip

FORBIDDEN = [
    *(Row(way, pod, "server", 8000) for way in (ONE_MACHINE,) for pod in (UNKNOWN_POD, UNKNOWN_POD_IN_OUR_NAMESPACE)),
    *(Row(PROD, pod, "engines", 8000) for pod in (UNKNOWN_POD, UNKNOWN_POD_IN_OUR_NAMESPACE, PROMETHEUS)),
    *(Row(PROD, CLIENT, node, port) for node in ("head", "engines") for port in (6379, 8265, 9464, 52365)),
    *(Row(RAY, RAY_POD_OF_ANOTHER, "head", port) for port in (6379, 8265)),
    *(Row(PROD, PROMETHEUS, "head", port) for port in (6379, 8265)),
    *(Row(PROD, EDGE, "head", port) for port in (6379, 8265)),
    Row(ONE_MACHINE, EDGE, "server", 8000),
    # it passes on every path, the admin API too
    Row((*PROD, "incremental-upgrade"), EDGE_BY_KUBERAY, "engines", 8000),
    Row(ONE_MACHINE, PROMETHEUS, "server", 9464),
    *(Row(way, pod, INTERNET, port) for way, pod in ((ONE_MACHINE, "server"), (RAY, "engines")) for port in (80, 443)),
    # a node's credentials, where nothing needs them
    Row(ONE_MACHINE, "server", Address("169.254.169.254"), 80),
    # the API server: the autoscaler's alone
    Row((*RAY, "autoscaling"), "engines", API_SERVER, 443),
    Row(PROD, "engines", API_SERVER, 6443),
    Row(PROD, "engines", COLLECTOR, 4318),
    Row(PROD, CLIENT, "graft-redis", 6379),
]


@pytest.mark.parametrize("row", NEEDED, ids=str)
def test_who_must_reach_whom(row: Row) -> None:
    assert holds(row)


@pytest.mark.parametrize("row", FORBIDDEN, ids=str)
def test_who_must_not_reach_whom(row: Row) -> None:
    assert not holds(row)


@pytest.mark.parametrize(
    ("policy", "passes"),
    [
        ({"podSelector": {}, "policyTypes": ["Ingress"]}, False),
        ({"podSelector": {}, "policyTypes": ["Egress"]}, True),
        ({"podSelector": {"matchLabels": {"app": "other"}}}, True),
        ({"podSelector": {}, "ingress": [{}]}, True),
        ({"podSelector": {}, "ingress": [{"ports": [{"port": 79, "endPort": 81}]}]}, True),
        ({"podSelector": {}, "ingress": [{"ports": [{"port": 80, "protocol": "UDP"}]}]}, False),
        ({"podSelector": {}, "ingress": [{"from": [{"podSelector": {}}]}]}, False),
        ({"podSelector": {}, "ingress": [{"from": [{"namespaceSelector": {}, "podSelector": {}}]}]}, True),
        ({"podSelector": {}, "ingress": [{"from": [{"ipBlock": {"cidr": "0.0.0.0/0"}}]}]}, False),
    ],
)  # fmt: skip
def test_a_policy_means_what_kubernetes_says(policy: Document, passes: bool) -> None:
    """By the API's reference: https://kubernetes.io/docs/concepts/services-networking/network-policies/"""
    policies = [{"metadata": {"namespace": "here"}, "spec": policy}]
    connection = Connection(Pod("there", {"app": "client"}), Pod("here", {"app": "server"}), 80)

    assert allowed(policies, connection) is passes


def test_every_policy_is_for_graft_alone() -> None:
    for way in (ONE_MACHINE, RAY, (*PROD, "incremental-upgrade", "tracing")):
        for policy in policies_of(rendered_with(*way), way):
            assert policy["spec"]["podSelector"]["matchLabels"]["app.kubernetes.io/part-of"] == "graft"
