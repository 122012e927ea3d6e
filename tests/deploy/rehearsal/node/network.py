"""A network namespace for each pod, on one bridge; Services as addresses that this process forwards from."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

from tests.deploy.rehearsal.program import pump

# One for each process that has pods: two rehearsals at a time are in nobody's way.
_NETWORK = ipaddress.ip_network(f"10.232.{os.getpid() % 250}.0/24")
_PREFIX = "rh"
_FIRST_SERVICE = 200

Endpoint = tuple[str, int]


def impossible() -> str | None:
    """Why there can't be such pods here, or None."""
    if os.geteuid() != 0:
        return "namespaces of mounts, processes and networks need root"
    if absent := [name for name in ("ip", "unshare", "nsenter", "setpriv", "pivot_root") if shutil.which(name) is None]:
        return f"needs {', '.join(absent)}"
    tried = subprocess.run(["unshare", "--mount", "--net", "--pid", "--fork", "true"], capture_output=True, check=False)
    return None if tried.returncode == 0 else f"no namespaces can be made: {tried.stderr.decode().strip()}"


class Network:
    """`close` removes everything that it made."""

    def __init__(self, hosts: Path, namespace: str) -> None:
        """`hosts` becomes the /etc/hosts of every pod, with the names that a namespace of Kubernetes has."""
        self._namespace = namespace
        _remove_abandoned()
        self._name = f"{_PREFIX}{os.getpid()}"
        self._hosts = hosts
        self._lock = threading.Lock()
        self._namespaces: list[str] = []
        self._listeners: dict[str, socket.socket] = {}
        self._pod_names: dict[str, str] = {}
        self.service_addresses: dict[str, str] = {}
        _ip("link", "add", self._name, "type", "bridge")
        _ip("addr", "add", f"{_NETWORK[1]}/24", "dev", self._name)
        _ip("link", "set", self._name, "up")
        self._write_hosts()

    @property
    def machine(self) -> str:
        """The address under which pods reach what runs beside the cluster."""
        return str(_NETWORK[1])

    def add_pod(self, name: str) -> tuple[str, str]:
        """The name of a new network namespace, and the address in it, which other pods find under the pod's name."""
        with self._lock:
            number = len(self._namespaces) + 2
            namespace, outside = f"{self._name}-{number}", f"{self._name}v{number}"
            self._namespaces.append(namespace)
        address = str(_NETWORK[number])
        _ip("netns", "add", namespace)
        _ip("link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        _ip("link", "set", outside, "master", self._name, "up")
        for command in (
            ("link", "set", "lo", "up"),
            ("addr", "add", f"{address}/24", "dev", "eth0"),
            ("link", "set", "eth0", "up"),
        ):
            _ip("-n", namespace, *command)
        # Nothing is forwarded from there, but there is a way, as in a cluster.
        _ip("-n", namespace, "route", "add", "default", "via", str(_NETWORK[1]))
        with self._lock:
            self._pod_names[address] = name
        self._write_hosts()
        return namespace, address

    def add_isolated(self) -> str:
        """A namespace that reaches nothing but itself."""
        with self._lock:
            namespace = f"{self._name}-alone"
            self._namespaces.append(namespace)
        _ip("netns", "add", namespace)
        _ip("-n", namespace, "link", "set", "lo", "up")
        return namespace

    def serve(self, service: str, port: int, endpoint: Callable[[], Endpoint | None]) -> None:
        """Give a Service its address, once; `endpoint` says where a new connection goes."""
        with self._lock:
            if service in self._listeners:
                return
            address = str(_NETWORK[_FIRST_SERVICE + len(self._listeners)])
            _ip("addr", "add", f"{address}/32", "dev", self._name)
            self._listeners[service] = socket.create_server((address, port))
            self.service_addresses[service] = address
        self._write_hosts()
        threading.Thread(target=_forward, args=(self._listeners[service], endpoint), daemon=True).start()

    def close(self) -> None:
        for listener in self._listeners.values():
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        for namespace in self._namespaces:
            subprocess.run(["ip", "netns", "delete", namespace], check=False)
        subprocess.run(["ip", "link", "delete", self._name], check=False)

    def _write_hosts(self) -> None:
        with self._lock:
            lines = ["127.0.0.1 localhost", *(f"{address} {name}" for address, name in self._pod_names.items())]
            for service, address in self.service_addresses.items():
                in_namespace = f"{service}.{self._namespace}"
                names = [service, in_namespace, f"{in_namespace}.svc", f"{in_namespace}.svc.cluster.local"]
                lines.append(f"{address} {' '.join(names)}")
            self._hosts.write_text("\n".join(lines) + "\n")  # in place: it is mounted


def _remove_abandoned() -> None:
    """What is left of processes that were killed."""
    names = subprocess.run(
        ["ip", "-brief", "link", "show", "type", "bridge"], capture_output=True, text=True, check=True
    )
    for bridge in re.findall(rf"^{_PREFIX}(\d+)\s", names.stdout, flags=re.MULTILINE):
        if not Path(f"/proc/{bridge}").exists():
            for namespace in Path("/run/netns").glob(f"{_PREFIX}{bridge}-*"):
                subprocess.run(["ip", "netns", "delete", namespace.name], check=False)
            subprocess.run(["ip", "link", "delete", f"{_PREFIX}{bridge}"], check=False)


def join(one: socket.socket, other: socket.socket) -> None:
    """Pass on what both say until both have ended."""
    threads = [threading.Thread(target=pump, args=pair, daemon=True) for pair in ((one, other), (other, one))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for end in (one, other):
        end.close()


def _forward(listener: socket.socket, endpoint: Callable[[], Endpoint | None]) -> None:
    while True:
        try:
            accepted, _ = listener.accept()
        except OSError:
            return
        threading.Thread(target=_forward_one, args=(accepted, endpoint()), daemon=True).start()


def _forward_one(accepted: socket.socket, target: Endpoint | None) -> None:
    with contextlib.suppress(OSError):
        if target is not None:
            join(accepted, socket.create_connection(target, timeout=600))
    accepted.close()


def _ip(*command: str) -> None:
    subprocess.run(["ip", *command], check=True, capture_output=True)
