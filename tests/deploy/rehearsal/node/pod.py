"""The life of a pod as the kubelet leads it: init containers in their order, sidecars, probes, restarts, the end."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.deploy.manifests import Document
from tests.deploy.rehearsal.images import Image
from tests.deploy.rehearsal.node import probes
from tests.deploy.rehearsal.node.container import Container, Surroundings
from tests.deploy.rehearsal.node.network import Network
from tests.deploy.rehearsal.node.variables import environment
from tests.deploy.rehearsal.node.volumes import Volumes
from tests.deploy.rehearsal.objects import Missing, Objects

_TICK_S = 0.2
_SYNC_S = 1.0  # the kubelet looks once a minute
_RESTART_AFTER_S = 1.0  # Kubernetes waits 10 s and then longer


@dataclass
class Node:
    """What a pod gets from the machine that it runs on. `images` are those that were brought to it."""

    objects: Objects
    network: Network
    home: Path
    files: Path
    images: dict[str, Image] = field(default_factory=dict)


class Pod:
    """Runs in threads of its own from when it is made until `stop`, or until its containers have ended."""

    def __init__(self, node: Node, name: str, template: Document) -> None:
        self.name = name
        self.template = template
        self.labels: dict[str, str] = template["metadata"].get("labels", {})
        self.phase = "Pending"
        self.waits_for = ""
        self.restarts = 0
        self.containers: dict[str, Container] = {}
        self._spec: Document = template["spec"]
        self._policy = self._spec.get("restartPolicy", "Always")
        self._node = node
        self._home = node.home / "pods" / name
        self._volumes = Volumes(node.objects, self._spec, self._home / "volumes", node.home / "claims")
        self._ready: set[str] = set()
        self._stopping = threading.Event()
        self.namespace, self.address = node.network.add_pod(name)
        self._thread = threading.Thread(target=self._live, daemon=True, name=name)
        self._thread.start()

    @property
    def ready(self) -> bool:
        sidecars = [each["name"] for each in self._spec.get("initContainers", []) if _is_sidecar(each)]
        return self.phase == "Running" and self._ready >= {
            *sidecars,
            *(each["name"] for each in self._spec["containers"]),
        }

    @property
    def ended(self) -> bool:
        return self.phase in ("Succeeded", "Failed")

    def port(self, name: int | str) -> int:
        return probes.port_number(name, [port for each in self._spec["containers"] for port in each.get("ports", [])])

    def log(self, container: str) -> Path:
        return self._home / f"{container}.log"

    def stop(self, grace_s: float | None = None) -> None:
        """As a deleted pod ends: preStop, SIGTERM, and SIGKILL after the grace period. Returns when it is gone."""
        grace_s = self._spec.get("terminationGracePeriodSeconds", 30) if grace_s is None else grace_s
        self._stopping.set()
        for spec in self._all_specs():
            hook = spec.get("lifecycle", {}).get("preStop", {}).get("exec")
            container = self.containers.get(spec["name"])
            if hook and grace_s and container and container.poll() is None:
                container.run(hook["command"], timeout_s=grace_s)
        for container in reversed(list(self.containers.values())):
            container.stop(grace_s)
        self._thread.join()

    def _live(self) -> None:
        if not self._until_there(self._volumes.prepare):
            return None
        supervisors = []
        for spec in self._spec.get("initContainers", []):
            if _is_sidecar(spec):
                supervisors.append(self._supervised(spec, "Always"))
            elif not self._init(spec):
                return self._end_all("Failed")
        if self._stopping.is_set():
            return None
        self.phase = "Running"
        main = [self._supervised(spec, self._policy) for spec in self._spec["containers"]]
        while any(thread.is_alive() for thread in main):
            time.sleep(_SYNC_S)
            self._volumes.refresh_all()
            if problems := self._volumes.too_large():
                self.waits_for = f"evicted: {', '.join(problems)}"
                return self._end_all("Failed")
        if self._stopping.is_set():
            return None
        codes = [self.containers[spec["name"]].poll() for spec in self._spec["containers"]]
        return self._end_all("Succeeded" if all(code == 0 for code in codes) else "Failed")

    def _end_all(self, phase: str) -> None:
        self._stopping.set()
        for container in self.containers.values():
            container.stop(self._spec.get("terminationGracePeriodSeconds", 30))
        self._ready.clear()
        self.phase = phase

    def _init(self, spec: Document) -> bool:
        """Whether it ended well in the end."""
        while self._start(spec):
            container = self.containers[spec["name"]]
            while container.poll() is None:
                time.sleep(_TICK_S)
            if container.poll() == 0:
                return True
            if self._policy == "Never" or self._stopping.wait(_RESTART_AFTER_S):
                return False
            self.restarts += 1
        return False

    def _supervised(self, spec: Document, policy: str) -> threading.Thread:
        thread = threading.Thread(target=self._supervise, args=(spec, policy), daemon=True)
        thread.start()
        return thread

    def _supervise(self, spec: Document, policy: str) -> None:
        """A container, started again as its policy says."""
        while self._start(spec):
            self._watch(spec, self.containers[spec["name"]])
            self._ready.discard(spec["name"])
            failed = self.containers[spec["name"]].poll() != 0
            if policy == "Never" or (policy == "OnFailure" and not failed) or self._stopping.wait(_RESTART_AFTER_S):
                return
            self.restarts += 1

    def _watch(self, spec: Document, container: Container) -> None:
        """Send its probes until it ends; kill it where they say so."""
        kinds = ["startupProbe"] if "startupProbe" in spec else ["readinessProbe", "livenessProbe"]
        due = {kind: time.monotonic() + spec[kind].get("initialDelaySeconds", 0) for kind in kinds if kind in spec}
        failures = dict.fromkeys(("startupProbe", "readinessProbe", "livenessProbe"), 0)
        if "startupProbe" not in spec and "readinessProbe" not in spec:
            self._ready.add(spec["name"])
        while container.poll() is None:
            kind = min(due, key=due.__getitem__, default=None)
            if kind is None or self._stopping.is_set() or due[kind] > time.monotonic():
                time.sleep(_TICK_S)
                continue
            due[kind] = time.monotonic() + spec[kind].get("periodSeconds", 10)
            passed = self._probe(spec, kind, container)
            failures[kind] = 0 if passed else failures[kind] + 1
            given_up = failures[kind] >= spec[kind].get("failureThreshold", 3)
            if kind == "startupProbe" and passed:
                due = {other: 0.0 for other in ("readinessProbe", "livenessProbe") if other in spec}
                if "readinessProbe" not in spec:
                    self._ready.add(spec["name"])
            elif kind == "readinessProbe":
                (self._ready.add if passed else self._ready.discard if given_up else lambda _: None)(spec["name"])
            elif given_up:
                container.stop(self._spec.get("terminationGracePeriodSeconds", 30))

    def _probe(self, spec: Document, kind: str, container: Container) -> bool:
        def run(command: list[str], timeout_s: float) -> int:
            return container.run(command, timeout_s=timeout_s).returncode

        return probes.succeeds(spec[kind], spec.get("ports", []), self.address, run)

    def _start(self, spec: Document) -> bool:
        """False: the pod was stopped before it could be."""
        variables: dict[str, str] = {}

        def refer() -> None:
            if spec["image"] not in self._node.images:
                raise Missing(f"image {spec['image']}")
            pod = {**self.template, "metadata": {"name": self.name, "namespace": "graft", **self.template["metadata"]}}
            pod["status"] = {"podIP": self.address}
            addresses = self._node.network.service_addresses
            variables.update(environment(self._node.objects, spec, pod, addresses))

        if not self._until_there(refer):
            return False
        surroundings = Surroundings(
            self.namespace, self._node.files, self._home, self._volumes, self._spec.get("securityContext", {})
        )
        image = self._node.images[spec["image"]]
        container = Container(spec, image, variables, surroundings, self.log(spec["name"]))
        self.containers[spec["name"]] = container
        if self._stopping.is_set():  # since it was looked at
            container.kill()
        return not self._stopping.is_set()

    def _until_there(self, refer: object) -> bool:
        """Wait for what is referred to; `waits_for` says what that is. False: stopped meanwhile."""
        while not self._stopping.is_set():
            try:
                refer()  # type: ignore[operator]
            except Missing as error:
                self.waits_for = str(error)
                time.sleep(_TICK_S)
            else:
                self.waits_for = ""
                return True
        return False

    def _all_specs(self) -> list[Document]:
        return [*self._spec.get("initContainers", []), *self._spec["containers"]]


def _is_sidecar(spec: Document) -> bool:
    return bool(spec.get("restartPolicy") == "Always")
