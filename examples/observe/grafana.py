"""Runs a Grafana with the dashboards, where Grafana is installed."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import yaml

from serve.deployment.ports import free_port

DASHBOARDS = Path("deploy/dashboards")
_HOMES = (Path("/usr/share/grafana"), Path("/opt/homebrew/opt/grafana/share/grafana"))


def command() -> list[str] | None:
    """The command that starts Grafana on this machine; None where it is not installed."""
    for words in (["grafana", "server"], ["grafana-server"]):
        if program := shutil.which(words[0]):
            return [program, *words[1:]]
    return None


@contextlib.contextmanager
def running_grafana(prometheus: str, directory: Path) -> Iterator[str | None]:
    """Yields the URL of the overview dashboard, or None where Grafana is not installed. No login is needed."""
    words = command()
    if words is None:
        yield None
        return
    port = free_port()
    _provision(prometheus, directory)
    environment = os.environ | {
        "GF_SERVER_HTTP_ADDR": "127.0.0.1",
        "GF_SERVER_HTTP_PORT": str(port),
        "GF_AUTH_ANONYMOUS_ENABLED": "true",
        "GF_AUTH_ANONYMOUS_ORG_ROLE": "Admin",
        "GF_ANALYTICS_REPORTING_ENABLED": "false",
        "GF_PATHS_DATA": str(directory / "data"),
        "GF_PATHS_LOGS": str(directory / "logs"),
        "GF_PATHS_PROVISIONING": str(directory / "provisioning"),
    }
    home = next((["--homepath", str(home)] for home in _HOMES if home.is_dir()), [])
    with (directory / "grafana.log").open("w") as log:
        process = subprocess.Popen([*words, *home], env=environment, stdout=log, stderr=log)
    try:
        yield f"http://127.0.0.1:{port}/d/graft-overview"
    finally:
        process.terminate()
        process.wait()


def _provision(prometheus: str, directory: Path) -> None:
    """Write the provisioning files with which Grafana loads the data source and the dashboards at its start."""
    sources = directory / "provisioning" / "datasources"
    boards = directory / "provisioning" / "dashboards"
    for path in (sources, boards):
        path.mkdir(parents=True, exist_ok=True)
    source = {"name": "Prometheus", "type": "prometheus", "access": "proxy", "url": prometheus, "isDefault": True}
    provider = {"name": "graft", "type": "file", "options": {"path": str(DASHBOARDS.absolute())}}
    (sources / "prometheus.yaml").write_text(yaml.safe_dump({"apiVersion": 1, "datasources": [source]}))
    (boards / "graft.yaml").write_text(yaml.safe_dump({"apiVersion": 1, "providers": [provider]}))
