"""NetworkPolicies evaluated as Kubernetes defines them: who may connect to whom.

Labels select pods and namespaces; a pod that no policy selects is open; policies only add up. What is outside of the
cluster, or in the network of a node, has only an address: there `ipBlock` decides, and a rule without peers.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.deploy.manifests import Document


@dataclass(frozen=True)
class Pod:
    """`namespace_labels` beside `kubernetes.io/metadata.name`, which every namespace has."""

    namespace: str
    labels: Mapping[str, str]
    namespace_labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Address:
    """Something that has no labels: a machine outside of the cluster, or what listens on the node itself."""

    ip: str


Peer = Pod | Address


@dataclass(frozen=True)
class Connection:
    source: Peer
    destination: Peer
    port: int
    protocol: str = "TCP"


def allowed(policies: Sequence[Document], connection: Connection) -> bool:
    """Both ends must let a connection pass: the source's egress, and the destination's ingress."""
    ends: tuple[tuple[str, str, Peer, Peer], ...] = (
        ("Egress", "to", connection.source, connection.destination),
        ("Ingress", "from", connection.destination, connection.source),
    )
    return all(_one_end_allows(policies, direction, key, own, other, connection) for direction, key, own, other in ends)


def _one_end_allows(
    policies: Sequence[Document], direction: str, key: str, own: Peer, other: Peer, connection: Connection
) -> bool:
    if isinstance(own, Address):
        return True
    selecting = [policy for policy in policies if direction in _types(policy["spec"]) and _selects(policy, own)]
    rules = [rule for policy in selecting for rule in policy["spec"].get(direction.lower(), [])]
    return not selecting or any(
        _ports_match(rule.get("ports", []), connection) and _peers_match(rule.get(key, []), own.namespace, other)
        for rule in rules
    )


def _types(spec: Document) -> list[str]:
    return list(spec.get("policyTypes") or ["Ingress", *(["Egress"] if "egress" in spec else [])])


def _selects(policy: Document, pod: Pod) -> bool:
    return policy["metadata"]["namespace"] == pod.namespace and matches(policy["spec"]["podSelector"], pod.labels)


def _ports_match(ports: Sequence[Document], connection: Connection) -> bool:
    return not ports or any(
        port.get("protocol", "TCP") == connection.protocol
        and ("port" not in port or port["port"] <= connection.port <= port.get("endPort", port["port"]))
        for port in ports
    )


def _peers_match(peers: Sequence[Document], namespace: str, other: Peer) -> bool:
    """`namespace` is that of the policy: a peer without a namespaceSelector is a pod of it."""
    return not peers or any(_peer_matches(peer, namespace, other) for peer in peers)


def _peer_matches(peer: Document, namespace: str, other: Peer) -> bool:
    if "ipBlock" in peer:
        return isinstance(other, Address) and _in_block(peer["ipBlock"], other.ip)
    if isinstance(other, Address):
        return False
    if "namespaceSelector" in peer:
        labels = {"kubernetes.io/metadata.name": other.namespace, **other.namespace_labels}
        if not matches(peer["namespaceSelector"], labels):
            return False
    elif other.namespace != namespace:
        return False
    return matches(peer.get("podSelector", {}), other.labels)


def _in_block(block: Document, ip: str) -> bool:
    address = ipaddress.ip_address(ip)
    excepted = any(address in ipaddress.ip_network(network) for network in block.get("except", []))
    return address in ipaddress.ip_network(block["cidr"]) and not excepted


def matches(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """A label selector; an empty one matches everything."""
    return all(_requirements(selector, labels))


def _requirements(selector: Mapping[str, Any], labels: Mapping[str, str]) -> Iterator[bool]:
    for key, value in selector.get("matchLabels", {}).items():
        yield labels.get(key) == value
    for expression in selector.get("matchExpressions", []):
        key, values = expression["key"], expression.get("values", [])
        match expression["operator"]:
            case "In":
                yield labels.get(key) in values
            case "NotIn":
                yield labels.get(key) not in values
            case "Exists":
                yield key in labels
            case "DoesNotExist":
                yield key not in labels
            case operator:
                raise ValueError(f"{operator} is no operator of a label selector")
