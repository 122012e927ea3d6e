"""Probes as the kubelet sends them."""

from __future__ import annotations

import http.client
import socket
import subprocess
from collections.abc import Callable

from tests.deploy.manifests import Document

Run = Callable[[list[str], float], int]


def succeeds(probe: Document, ports: list[Document], address: str, run: Run) -> bool:
    """`run` runs a command in the container and says its exit status; it may raise TimeoutExpired."""
    timeout_s = probe.get("timeoutSeconds", 1)
    try:
        if "exec" in probe:
            return run(probe["exec"]["command"], timeout_s) == 0
        if "tcpSocket" in probe:
            socket.create_connection((address, port_number(probe["tcpSocket"]["port"], ports)), timeout_s).close()
            return True
        return _answers(probe["httpGet"], ports, address, timeout_s)
    except (OSError, http.client.HTTPException, subprocess.TimeoutExpired):
        return False


def port_number(port: int | str, ports: list[Document]) -> int:
    """By name, as probes and Services refer to it."""
    if isinstance(port, int):
        return port
    (number,) = [each["containerPort"] for each in ports if each.get("name") == port]
    return int(number)


def _answers(request: Document, ports: list[Document], address: str, timeout_s: float) -> bool:
    connection = http.client.HTTPConnection(address, port_number(request["port"], ports), timeout=timeout_s)
    try:
        headers = {"User-Agent": "kube-probe/1.34", "Accept": "*/*", "Connection": "close"}
        connection.request("GET", request.get("path", "/"), headers=headers)
        return 200 <= connection.getresponse().status < 400
    finally:
        connection.close()
