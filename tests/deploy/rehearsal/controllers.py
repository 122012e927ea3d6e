"""What makes pods of objects: Deployments, Jobs, single pods; and what sends a Service's connections to them."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from pathlib import Path

from tests.deploy.manifests import Document
from tests.deploy.rehearsal.container import machine_files
from tests.deploy.rehearsal.network import Endpoint, Network
from tests.deploy.rehearsal.objects import Objects
from tests.deploy.rehearsal.pod import Node, Pod

_TICK_S = 0.2
NAMESPACE = "graft"
# Nothing acts on these here. A kind that is in neither list is refused: it would be ignored silently.
_KEPT = ("ConfigMap", "Namespace", "NetworkPolicy", "PersistentVolumeClaim", "Secret", "ServiceAccount")
_RUN = ("Deployment", "Job", "Pod", "Service")
KINDS = (*_KEPT, *_RUN)


class Cluster:
    """One node, one namespace. `close` ends everything."""

    def __init__(self, home: Path) -> None:
        files = home / "machine"
        machine_files(files)
        self.objects = Objects()
        self.network = Network(files / "hosts", NAMESPACE)
        self.node = Node(self.objects, self.network, home, files)
        self._pods: dict[tuple[str, str], list[Pod]] = {}  # by kind and name of what they belong to
        self._numbers = itertools.count(1)
        self._lock = threading.RLock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._control, daemon=True)
        self._thread.start()

    def pods_of(self, kind: str, name: str) -> list[Pod]:
        with self._lock:
            return list(self._pods.get((kind, name), []))

    def pods(self) -> list[Pod]:
        with self._lock:
            return [pod for pods in self._pods.values() for pod in pods]

    def condition(self, kind: str, name: str, condition: str) -> bool:
        """Whether `kubectl wait --for=condition=…` would find it true."""
        pods = self.pods_of(kind, name)
        match kind, condition.lower():
            case "Pod", "ready":
                return any(pod.ready for pod in pods)
            case "Deployment", "available":
                current = self.objects.find(kind, name)
                return any(pod.ready and current and pod.template == current["spec"]["template"] for pod in pods)
            case "Job", "complete":
                return any(pod.phase == "Succeeded" for pod in pods)
            case "Job", "failed":
                document = self.objects.find(kind, name)
                return document is not None and self._has_failed(document, pods)
        raise NotImplementedError(f"the condition {condition} of a {kind}")

    def endpoint(self, service: Document, *, only_ready: bool = True) -> Endpoint | None:
        """Of the pod that a Service's next connection goes to; a port-forward takes one that isn't ready too."""
        selector, port = service["spec"]["selector"], service["spec"]["ports"][0]
        for pod in self.pods():
            if selector.items() <= pod.labels.items() and (pod.ready or (not only_ready and pod.phase == "Running")):
                return pod.address, pod.port(port.get("targetPort", port["port"]))
        return None

    def delete(self, kind: str, name: str, grace_s: float | None = None) -> None:
        """Returns when its pods are gone. Raises Refused if it isn't there."""
        self.objects.delete(kind, name)
        for pod in self.pods_of(kind, name):
            pod.stop(grace_s)
        with self._lock:
            self._pods.pop((kind, name), None)

    def delete_all(self, grace_s: float | None = None) -> None:
        """With the namespace."""
        self.objects.delete_all()
        for pod in self.pods():
            pod.stop(grace_s)
        with self._lock:
            self._pods.clear()

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
        self.delete_all(grace_s=0)
        self.network.close()

    def _control(self) -> None:
        while not self._closed.wait(_TICK_S):
            for service in self.objects.all("Service"):
                name, port = service["metadata"]["name"], service["spec"]["ports"][0]["port"]
                self.network.serve(name, port, self._endpoints(name))
            for document in self.objects.all("Pod"):
                self._keep_one(document, document, replaced=lambda pods: not pods)
            for document in self.objects.all("Deployment"):
                self._keep_deployment(document)
            for document in self.objects.all("Job"):
                self._keep_one(document, document["spec"]["template"], replaced=self._job_needs_another(document))

    def _endpoints(self, name: str) -> Callable[[], Endpoint | None]:
        def endpoint() -> Endpoint | None:
            service = self.objects.find("Service", name)
            return self.endpoint(service) if service else None

        return endpoint

    def _keep_one(self, owner: Document, template: Document, replaced: Callable[[list[Pod]], bool]) -> None:
        key = (owner["kind"], owner["metadata"]["name"])
        with self._lock:
            pods = self._pods.setdefault(key, [])
            if replaced(pods) and self.objects.find(*key) is not None:
                name = key[1] if key[0] == "Pod" else f"{key[1]}-{next(self._numbers)}"
                pods.append(Pod(self.node, name, template))

    def _keep_deployment(self, document: Document) -> None:
        """Only of one replica that is replaced by stopping it first: others aren't known here."""
        spec = document["spec"]
        if spec["replicas"] != 1 or spec["strategy"] != {"type": "Recreate"}:
            raise NotImplementedError("a Deployment other than of one replica with the strategy Recreate")
        key = ("Deployment", document["metadata"]["name"])
        for pod in self.pods_of(*key):
            if pod.template != spec["template"]:
                pod.stop()
                with self._lock:
                    self._pods[key].remove(pod)
        self._keep_one(document, spec["template"], replaced=lambda pods: not pods)

    def _job_needs_another(self, document: Document) -> Callable[[list[Pod]], bool]:
        def needs(pods: list[Pod]) -> bool:
            return all(pod.phase == "Failed" for pod in pods) and not self._has_failed(document, pods)

        return needs

    @staticmethod
    def _has_failed(document: Document, pods: list[Pod]) -> bool:
        failed = sum(pod.phase == "Failed" for pod in pods)
        return failed > document["spec"].get("backoffLimit", 6)
