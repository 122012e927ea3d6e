"""The objects of one namespace, and what an API server refuses to take in."""

from __future__ import annotations

import threading
from typing import Any

from tests.deploy.manifests import Document, containers, pod_templates, validate

# What can't change in an object that is there.
_IMMUTABLE = {
    "Job": ("template", "selector", "completions"),
    "Deployment": ("selector",),
    "PersistentVolumeClaim": ("accessModes", "storageClassName", "volumeMode"),
}
_RESTRICTED = "pod-security.kubernetes.io/enforce"


class Refused(Exception):
    """The API server says no; the message is what kubectl prints."""


class Missing(Exception):
    """A pod waits for this object."""


class Objects:
    """By kind and name. Every method may be called by any thread."""

    def __init__(self) -> None:
        self._objects: dict[tuple[str, str], Document] = {}
        self._lock = threading.RLock()

    def apply(self, document: Document, *, create: bool = False) -> str:
        """As `kubectl apply` or `create` prints it. Raises Refused."""
        key = (document["kind"], document["metadata"]["name"])
        with self._lock:
            old = self._objects.get(key)
            if old is not None and create:
                raise Refused(f"{key[0]} {key[1]} already exists")
            self._admit(document, old)
            self._objects[key] = document
        change = "created" if old is None else "unchanged" if old == document else "configured"
        return f"{key[0].lower()}/{key[1]} {change}"

    def find(self, kind: str, name: str) -> Document | None:
        with self._lock:
            return self._objects.get((kind, name))

    def all(self, kind: str) -> list[Document]:
        with self._lock:
            return [document for (its_kind, _), document in self._objects.items() if its_kind == kind]

    def delete(self, kind: str, name: str) -> None:
        with self._lock:
            if self._objects.pop((kind, name), None) is None:
                raise Refused(f'{kind} "{name}" not found')

    def delete_all(self) -> None:
        with self._lock:
            self._objects.clear()

    def _admit(self, document: Document, old: Document | None) -> None:
        kind, name = document["kind"], document["metadata"]["name"]
        namespace = document["metadata"].get("namespace")
        if kind != "Namespace" and ("Namespace", namespace) not in self._objects:
            raise Refused(f'namespaces "{namespace}" not found')
        if problems := validate(document):
            raise Refused(f"{kind} {name}: {'; '.join(problems)}")
        for part in _IMMUTABLE.get(kind, ()):
            if old is not None and old["spec"].get(part) != document["spec"].get(part):
                raise Refused(f'The {kind} "{name}" is invalid: spec.{part}: field is immutable')
        account = document["spec"].get("serviceAccountName") if kind == "Pod" else None
        if account and ("ServiceAccount", account) not in self._objects:
            raise Refused(f'pods "{name}" is forbidden: error looking up service account {namespace}/{account}')
        labels = {} if kind == "Namespace" else self._objects["Namespace", str(namespace)]["metadata"].get("labels", {})
        if labels.get(_RESTRICTED) == "restricted":
            templates = [template for _, template in pod_templates(document)]
            if problems := [problem for template in templates for problem in not_restricted(template["spec"])]:
                raise Refused(f'{kind} "{name}" is forbidden: violates PodSecurity "restricted": {", ".join(problems)}')


def not_restricted(spec: Document) -> list[str]:
    """What a pod lacks for the Pod Security Standard "restricted"."""
    pod: dict[str, Any] = spec.get("securityContext", {})
    problems = [name for name in ("hostNetwork", "hostPID", "hostIPC") if spec.get(name)]
    kinds = {"name", "configMap", "emptyDir", "persistentVolumeClaim", "projected", "secret", "downwardAPI", "csi"}
    problems += [f"volume {volume['name']}" for volume in spec.get("volumes", []) if not set(volume) <= kinds]
    for container in containers({"spec": spec}):
        own = pod | container.get("securityContext", {})
        checks = {
            "runAsNonRoot != true": own.get("runAsNonRoot") is True,
            "seccompProfile": own.get("seccompProfile", {}).get("type") in ("RuntimeDefault", "Localhost"),
            "allowPrivilegeEscalation != false": own.get("allowPrivilegeEscalation") is False,
            "unrestricted capabilities": "ALL" in own.get("capabilities", {}).get("drop", []),
        }
        problems += [f"{container['name']}: {problem}" for problem, kept in checks.items() if not kept]
    return problems
