"""Runs a Prometheus on this machine: starts it, queries it, and stops it."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from serve.deployment.ports import free_port
from serve.follower.http_client import direct_client

RULES = Path("deploy/alerts/rules.yaml")
_START_TIMEOUT_S = 60


@dataclass(frozen=True)
class Prometheus:
    """A running Prometheus at `url`."""

    url: str

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series of an instant query. Raises RuntimeError with the reason if Prometheus refuses the query."""
        return self._ask("query", query=expression)

    def query_range(self, expression: str, seconds: float, step_s: float) -> list[dict[str, Any]]:
        """The series of the last `seconds`."""
        now = time.time()
        return self._ask("query_range", query=expression, start=now - seconds, end=now, step=step_s)

    def firing(self) -> set[str]:
        """The names of the alerts that are firing."""
        return {sample["metric"]["alertname"] for sample in self.query('ALERTS{alertstate="firing"}')}

    def _ask(self, endpoint: str, **parameters: str | float) -> list[dict[str, Any]]:
        with direct_client(timeout=30) as client:
            answer = client.get(f"{self.url}/api/v1/{endpoint}", params=parameters).json()
        if answer["status"] != "success":
            raise RuntimeError(f"{parameters['query']}: {answer['error']}")
        series: list[dict[str, Any]] = answer["data"]["result"]
        return series


def is_installed() -> bool:
    return shutil.which("prometheus") is not None


@contextlib.contextmanager
def running_prometheus(
    targets: Sequence[str], directory: Path, port: int | None = None, scrape_s: int = 2
) -> Iterator[Prometheus]:
    """A Prometheus that scrapes `targets` (HOST:PORT) and evaluates Graft's rules. Its data are in `directory`."""
    port = port or free_port()
    directory.mkdir(parents=True, exist_ok=True)
    config = directory / "prometheus.yml"
    config.write_text(yaml.safe_dump(configuration(targets, scrape_s)))
    data = directory / "data"
    shutil.rmtree(data, ignore_errors=True)
    command = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={data}"]
    with (directory / "prometheus.log").open("w") as log:
        process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)
    try:
        _wait_until_ready(f"http://127.0.0.1:{port}", process)
        yield Prometheus(f"http://127.0.0.1:{port}")
    finally:
        process.terminate()
        process.wait()


def configuration(targets: Sequence[str], scrape_s: int) -> dict[str, Any]:
    interval = f"{scrape_s}s"
    return {
        "global": {"scrape_interval": interval, "evaluation_interval": interval},
        "rule_files": [str(RULES.absolute())],
        "scrape_configs": [{"job_name": "graft", "static_configs": [{"targets": list(targets)}]}],
    }


def _wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    with direct_client() as client:
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(httpx.HTTPError):
                if client.get(f"{url}/-/ready").is_success:
                    return
            time.sleep(0.2)
    raise RuntimeError(f"Prometheus did not get ready at {url}")
