"""The environment of a container as the kubelet makes it, and the `$(NAME)` in its command."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any

from tests.deploy.manifests import Document
from tests.deploy.rehearsal.objects import Missing, Objects

_SUFFIXES = {"m": Decimal("0.001"), "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "k": 10**3, "M": 10**6, "G": 10**9}


def quantity(text: Any) -> Decimal:
    """Kubernetes' numbers with a unit: cores, or bytes."""
    number, suffix = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", str(text)).groups()  # type: ignore[union-attr]
    return Decimal(number) * (_SUFFIXES[suffix] if suffix else 1)


def environment(
    objects: Objects, container: Document, pod: Document, service_addresses: Mapping[str, str]
) -> dict[str, str]:
    """What a container finds beside the variables of its image. Raises Missing if it refers to what isn't there."""
    variables = _service_links(objects, service_addresses) if pod["spec"].get("enableServiceLinks", True) else {}
    for source in container.get("envFrom", []):
        (kind, reference), *_ = source.items()
        variables |= {
            source.get("prefix", "") + key: value for key, value in _entries(objects, kind, reference).items()
        }
    for variable in container.get("env", []):
        value = variable.get("value", "")
        if source := variable.get("valueFrom"):
            value = _referred(objects, source, container, pod)
        variables[variable["name"]] = expanded(value, variables)
    return variables


def expanded(text: str, variables: Mapping[str, str]) -> str:
    """A reference to what isn't there stays as it is; `$$` is one dollar."""
    return re.sub(
        r"\$(\$|\(([A-Za-z_][A-Za-z0-9_.-]*)\))",
        lambda match: "$" if match[1] == "$" else variables.get(match[2], match[0]),
        text,
    )


def expanded_all(texts: Iterable[str], variables: Mapping[str, str]) -> list[str]:
    return [expanded(text, variables) for text in texts]


def decoded(document: Document) -> dict[str, bytes]:
    """The entries of a ConfigMap or a Secret."""
    plain = document.get("data") or {}
    if document["kind"] == "Secret":
        return {key: base64.b64decode(value) for key, value in plain.items()}
    return {key: value.encode() for key, value in plain.items()}


def _entries(objects: Objects, kind: str, reference: Document) -> dict[str, str]:
    document = objects.find({"configMapRef": "ConfigMap", "secretRef": "Secret"}[kind], reference["name"])
    if document is None and reference.get("optional"):
        return {}
    if document is None:
        raise Missing(f"{kind} {reference['name']}")
    return {key: value.decode() for key, value in decoded(document).items()}


def _referred(objects: Objects, source: Document, container: Document, pod: Document) -> str:
    (kind, reference), *_ = source.items()
    if kind == "resourceFieldRef":
        limit, _, resource = reference["resource"].partition(".")
        return str(math.ceil(quantity(container["resources"][limit][resource])))
    if kind == "fieldRef":
        if reference["fieldPath"] == "status.podIP":
            return str(pod["status"]["podIP"])
        return str(pod["metadata"][reference["fieldPath"].removeprefix("metadata.")])
    name = {"configMapKeyRef": "configMapRef", "secretKeyRef": "secretRef"}[kind]
    entries = _entries(objects, name, reference)
    if reference["key"] not in entries and not reference.get("optional"):
        raise Missing(f"the entry {reference['key']} of {reference['name']}")
    return entries.get(reference["key"], "")


def _service_links(objects: Objects, addresses: Mapping[str, str]) -> dict[str, str]:
    """Variables with the address of every Service of the namespace."""
    links = {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_SERVICE_PORT": "443"}
    for service in objects.all("Service"):
        name, address = service["metadata"]["name"], addresses[service["metadata"]["name"]]
        prefix, port = name.upper().replace("-", "_"), service["spec"]["ports"][0]["port"]
        links |= {f"{prefix}_SERVICE_HOST": address, f"{prefix}_SERVICE_PORT": str(port)}
        links |= {f"{prefix}_PORT": f"tcp://{address}:{port}", f"{prefix}_PORT_{port}_TCP": f"tcp://{address}:{port}"}
    return links
