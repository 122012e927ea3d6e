"""What makes pods of objects: Deployments, Jobs, single pods; and what sends a Service's connections to them."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from pathlib import Path

from tests.deploy.manifests import Document
from tests.deploy.rehearsal import ray_service
from tests.deploy.rehearsal.node.container import machine_files
from tests.deploy.rehearsal.node.network import Endpoint, Network
from tests.deploy.rehearsal.node.pod import Node, Pod
from tests.deploy.rehearsal.node.resources import LAPTOP, Resources, requests
from tests.deploy.rehearsal.objects import Objects

_TICK_S = 0.2
NAMESPACE = "graft"
# Nothing acts on these here. A kind that is in neither list is refused: it would be ignored silently.
_KEPT = (
    *("ConfigMap", "Gateway", "HTTPRoute", "Namespace", "NetworkPolicy", "PersistentVolumeClaim", "PodMonitor"),
    *("PodDisruptionBudget", "PrometheusRule", "Role", "RoleBinding", "Secret", "ServiceAccount", "StatefulSet"),
)
_RUN = ("Deployment", "Job", "Pod", "RayService", "Service")
KINDS = (*_KEPT, *_RUN)


class Cluster:
    """One node, one namespace. `close` ends everything."""

    def __init__(self, home: Path, room: Resources = LAPTOP) -> None:
        """`room` is what the node has left for pods; a pod that asks for more than is free is not made."""
        files = home / "machine"
        machine_files(files)
        self.objects = Objects()
        self.network = Network(files / "hosts", NAMESPACE)
        self.node = Node(self.objects, self.network, home, files)
        self.not_scheduled: dict[tuple[str, str], str] = {}  # why, by kind and name of what the pod belongs to
        self._room = room
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
            case "RayService", "ready":
                return any(pod.ready for pod in self.pods_of(kind, f"{name}-worker"))
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
            for document in self.objects.all("RayService"):
                self._keep_ray_service(document)
            for document in self.objects.all("Job"):
                self._keep_one(document, document["spec"]["template"], replaced=self._job_needs_another(document))

    def _endpoints(self, name: str) -> Callable[[], Endpoint | None]:
        def endpoint() -> Endpoint | None:
            service = self.objects.find("Service", name)
            return self.endpoint(service) if service else None

        return endpoint

    def _keep_one(
        self, owner: Document, template: Document, replaced: Callable[[list[Pod]], bool], suffix: str = ""
    ) -> None:
        kind, owner_name = owner["kind"], owner["metadata"]["name"]
        key = (kind, owner_name + suffix)
        with self._lock:
            pods = self._pods.setdefault(key, [])
            owned = self.objects.find(kind, owner_name) is not None
            if replaced(pods) and owned and self._can_start(key, template["spec"]):
                name = key[1] if key[0] == "Pod" else f"{key[1]}-{next(self._numbers)}"
                pods.append(Pod(self.node, name, template))

    def _can_start(self, key: tuple[str, str], spec: Document) -> bool:
        account = spec.get("serviceAccountName")
        free = self._room - sum((requests(pod.template["spec"]) for pod in self.pods() if not pod.ended), Resources())
        if account and self.objects.find("ServiceAccount", account) is None:
            self.not_scheduled[key] = f"{key[1]}: there is no service account {account}"
        elif not requests(spec).fit_in(free):
            self.not_scheduled[key] = f"{key[1]} asks for {requests(spec)}, the node has {free} left"
        else:
            self.not_scheduled.pop(key, None)
            return True
        return False

    def _keep_deployment(self, document: Document) -> None:
        """Only of one replica that is replaced by stopping it first: others aren't known here."""
        spec = document["spec"]
        if spec["replicas"] != 1 or spec["strategy"] != {"type": "Recreate"}:
            raise NotImplementedError("a Deployment other than of one replica with the strategy Recreate")
        self._keep_current(document, spec["template"])

    def _keep_ray_service(self, document: Document) -> None:
        """A head and one worker, in place of what runs: the operator would bring a second cluster up beside it."""
        service = ray_service.service_of(document)
        if self.objects.find("Service", service["metadata"]["name"]) != service:
            self.objects.apply(service)
        self._keep_current(document, ray_service.head_of(document), "-head")
        self._keep_current(document, ray_service.worker_of(document), "-worker")

    def _keep_current(self, owner: Document, template: Document, suffix: str = "") -> None:
        """One pod, of this template."""
        key = (owner["kind"], owner["metadata"]["name"] + suffix)
        for pod in self.pods_of(*key):
            if pod.template != template:
                pod.stop()
                with self._lock:
                    self._pods[key].remove(pod)
        self._keep_one(owner, template, lambda pods: not pods, suffix)

    def _job_needs_another(self, document: Document) -> Callable[[list[Pod]], bool]:
        def needs(pods: list[Pod]) -> bool:
            return all(pod.phase == "Failed" for pod in pods) and not self._has_failed(document, pods)

        return needs

    @staticmethod
    def _has_failed(document: Document, pods: list[Pod]) -> bool:
        failed = sum(pod.phase == "Failed" for pod in pods)
        return failed > document["spec"].get("backoffLimit", 6)
