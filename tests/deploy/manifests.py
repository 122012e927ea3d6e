"""The manifests as kubectl renders them, and the strict schemas that they are checked against."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from jsonschema import Draft202012Validator

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
OVERLAYS = sorted(path.name for path in (DEPLOY / "overlays").iterdir())
SERVING = [overlay for overlay in OVERLAYS if not overlay.startswith(("convert", "checkpoints"))]
KUBERNETES = "1.34"

needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl, which renders, is not there")

Document = dict[str, Any]


@cache
def rendered(overlay: str) -> tuple[Document, ...]:
    return kustomize(DEPLOY / "overlays" / overlay)


@cache
def rendered_with(overlay: str, *components: str) -> tuple[Document, ...]:
    """An overlay of one's own above `overlay`, which adds components of Graft's, as the documentation says."""
    with tempfile.TemporaryDirectory() as home:
        above = Path(os.path.relpath(DEPLOY, Path(home).resolve()))
        document = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "namespace": "graft",
            "resources": [str(above / "overlays" / overlay)],
            "components": [str(above / "components" / component) for component in components],
        }
        (Path(home) / "kustomization.yaml").write_text(yaml.safe_dump(document))
        return kustomize(Path(home))


@cache
def rendered_copy(overlay: str, *components: str) -> tuple[Document, ...]:
    """A copy of `overlay` that names these components too. `graft-state-place` comes with object-store, as its comment
    says. Raises RenderingFailed."""
    with tempfile.TemporaryDirectory() as home:
        deploy = Path(home) / "deploy"
        shutil.copytree(DEPLOY, deploy, ignore=shutil.ignore_patterns("__pycache__"))
        path = deploy / "overlays" / overlay / "kustomization.yaml"
        document = yaml.safe_load(path.read_text())
        added = [f"../../components/{component}" for component in components]
        document["components"] = [*document.get("components", []), *added]
        generators = document.setdefault("configMapGenerator", [])
        if "object-store" in components and all(each["name"] != "graft-state-place" for each in generators):
            generators.append({"name": "graft-state-place", "literals": ["STATE_URL=s3://bucket/state"]})
        path.write_text(yaml.safe_dump(document, sort_keys=False))
        return kustomize(path.parent)


class RenderingFailed(AssertionError):
    """What kubectl said."""


def kustomize(directory: Path) -> tuple[Document, ...]:
    command = ["kubectl", "kustomize", str(directory)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    if result.returncode:
        raise RenderingFailed(result.stderr)
    return tuple(yaml.safe_load_all(result.stdout))


def only(documents: tuple[Document, ...], kind: str, name: str | None = None) -> Document:
    """The one object of that kind; a generated name may end in a hash."""
    matching = [
        document
        for document in documents
        if document["kind"] == kind
        and (name is None or re.fullmatch(f"{name}(-[a-z0-9]{{10}})?", document["metadata"]["name"]))
    ]
    assert len(matching) == 1, [document["metadata"]["name"] for document in matching]
    return matching[0]


def pod_templates(document: Document) -> Iterator[tuple[str, Document]]:
    """Every pod that an object makes, by a name for messages."""
    kind, name = document["kind"], document["metadata"]["name"]
    if kind == "Pod":
        yield f"{kind}/{name}", document
    if kind in ("Deployment", "StatefulSet", "Job"):
        yield f"{kind}/{name}", document["spec"]["template"]
    if kind == "RayService":
        cluster = document["spec"]["rayClusterConfig"]
        yield f"{kind}/{name} head", cluster["headGroupSpec"]["template"]
        for group in cluster["workerGroupSpecs"]:
            yield f"{kind}/{name} {group['groupName']}", group["template"]


def containers(template: Document) -> list[Document]:
    spec = template["spec"]
    return [*spec.get("initContainers", []), *spec["containers"]]


def validate(document: Document) -> list[str]:
    """What is wrong with an object, by Kubernetes' own schema or that of its CRD."""
    if validator := crd_validator(document["apiVersion"], document["kind"]):
        return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(document)]
    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except (kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError) as error:
        return [repr(error)]
    return []


@cache
def crd_validator(api_version: str, kind: str) -> Draft202012Validator | None:
    path = Path(__file__).parent / "schemas" / f"{kind.lower()}.json"
    if not path.exists():
        return None
    known = json.loads(path.read_text())
    assert (known["apiVersion"], known["kind"]) == (api_version, kind)
    schema = _strict(known["schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    return Draft202012Validator(schema)


def _strict(schema: Any) -> Any:
    """A structural schema of Kubernetes as JSON schema that refuses fields it does not know."""
    if not isinstance(schema, dict):
        return schema
    schema = dict(schema)
    if schema.pop("x-kubernetes-int-or-string", False):
        schema.pop("anyOf", None)
        schema["type"] = ["integer", "string"]
    keeps = schema.pop("x-kubernetes-preserve-unknown-fields", False)
    if "properties" in schema:
        schema["properties"] = {name: _strict(field_schema) for name, field_schema in schema["properties"].items()}
        if not keeps:
            schema.setdefault("additionalProperties", False)
    for part in ("items", "additionalProperties"):
        if isinstance(schema.get(part), dict):
            schema[part] = _strict(schema[part])
    return schema


def missing(documents: tuple[Document, ...], beside: tuple[Document, ...] = ()) -> dict[str, set[Any]]:
    """What pods mount or refer to and nobody makes, by the pod. `beside`: what is applied in the same namespace."""
    objects = {(document["kind"], document["metadata"]["name"]) for document in (*documents, *beside)}
    # Made by whoever installs (docs/how-to/deploy-on-kubernetes.md).
    objects |= {("Secret", name) for name in ("graft-admin", "graft-keys", "graft-redis", "graft-object-store")}
    lacking = {}
    for document in documents:
        for name, template in pod_templates(document):
            volumes = {volume["name"] for volume in template["spec"]["volumes"]}
            volumes |= {claim["metadata"]["name"] for claim in document["spec"].get("volumeClaimTemplates", [])}
            mounted = {mount["name"] for container in containers(template) for mount in container["volumeMounts"]}
            if unmet := (mounted - volumes) | (wanted(template) - objects):
                lacking[name] = unmet
    return lacking


def wanted(template: Document) -> set[tuple[str, str]]:
    """Objects that a pod refers to."""
    references = {("ServiceAccount", template["spec"]["serviceAccountName"])}
    for volume in template["spec"]["volumes"]:
        if "configMap" in volume:
            references.add(("ConfigMap", volume["configMap"]["name"]))
        if "secret" in volume:
            references.add(("Secret", volume["secret"]["secretName"]))
        if "persistentVolumeClaim" in volume:
            references.add(("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]))
    for container in containers(template):
        for source in container.get("envFrom", []):
            kind, key = ("ConfigMap", "configMapRef") if "configMapRef" in source else ("Secret", "secretRef")
            references.add((kind, source[key]["name"]))
        for variable in container.get("env", []):
            if secret := variable.get("valueFrom", {}).get("secretKeyRef"):
                references.add(("Secret", secret["name"]))
    return references
