"""The other programs that a reader types: docker, those that bring images into a cluster, and make."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from tests.deploy.rehearsal import kubectl
from tests.deploy.rehearsal.controllers import Cluster
from tests.deploy.rehearsal.images import Image
from tests.deploy.rehearsal.node.pod import Node, Pod
from tests.deploy.rehearsal.objects import Objects, Refused

PROGRAMS = ("docker", "k3s", "kind", "kubectl", "make", "minikube")
_TICK_S = 0.1


class Programs:
    """`stages` are the targets of the Dockerfile: an image is what its Dockerfile says, nothing is built."""

    def __init__(self, cluster: Cluster, home: Path, stages: Mapping[str, Image]) -> None:
        self._cluster = cluster
        self._stages = stages
        self._docker = Node(Objects(), cluster.network, home, cluster.node.files)
        self._runs = 0

    def answer(self, program: str, arguments: list[str], directory: Path, data: str) -> str:
        """The output. Raises Refused with what is printed instead; what isn't known here is refused."""
        match program, arguments:
            case "docker", ["build", "--target", stage, "-t", name, "."] if stage in self._stages:
                self._docker.images[name] = self._stages[stage]
                return ""
            case "docker", ["run", "--rm", "--entrypoint", entrypoint, image, *command]:
                return self._run(image, entrypoint, command)
            case "docker", ["push", name]:
                return self._load([name])  # of a registry, a node gets what its pods ask for
            case "docker", ["save", *names]:
                return " ".join(names)
            case ("kind", ["load", "docker-image", *names]) | ("minikube", ["image", "load", *names]):
                return self._load(names)
            case "k3s", ["ctr", "images", "import", "-"]:
                return self._load(data.split())
            case "k3s", ["kubectl", "config", "view", "--raw"]:
                return "apiVersion: v1\nkind: Config\n"
            case ("kind", ["create", "cluster"]) | ("minikube", ["start", *_]) | ("make", ["environment"]):
                return ""
            case "kubectl", _:
                return kubectl.answer(self._cluster, arguments, directory, data)
        raise Refused(f"this rehearsal has no {program} {' '.join(arguments)}")

    def _load(self, names: list[str]) -> str:
        if absent := [name for name in names if name not in self._docker.images]:
            raise Refused(f"no such image: {', '.join(absent)}")
        self._cluster.node.images.update({name: self._docker.images[name] for name in names})
        return ""

    def _run(self, image: str, entrypoint: str, command: list[str]) -> str:
        if image not in self._docker.images:
            raise Refused(f"Unable to find image '{image}' locally")
        self._runs += 1
        container = {"name": "run", "image": image, "command": [entrypoint], "args": command}
        template = {"metadata": {}, "spec": {"restartPolicy": "Never", "containers": [container]}}
        pod = Pod(self._docker, f"docker-{self._runs}", template)
        while not pod.ended:
            time.sleep(_TICK_S)
        output = pod.log("run").read_text()
        if pod.phase == "Failed":
            raise Refused(output)
        return output
