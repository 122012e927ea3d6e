"""A proxy of the environment gets no request for a server of Graft, and so neither prompts nor keys."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from serve.catalogue.state_dir import StateDir
from serve.deployment.local import _wait_until_answering
from serve.follower.admin_client import AdminClient
from serve.follower.http_client import direct_async_client, direct_client
from tests.recording_proxy import RecordingProxy


class Answering(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"adapters": []}')

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answering) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_the_recording_proxy_is_one_that_httpx_would_use(url: str, proxy: RecordingProxy) -> None:
    with pytest.raises(httpx.HTTPError):
        httpx.get(url)

    assert proxy.first_lines == [f"GET {url}/ HTTP/1.1\r\n".encode()]


async def test_clients_for_our_servers_use_no_proxy(url: str, proxy: RecordingProxy) -> None:
    with direct_client() as client:
        assert client.get(url).is_success
    async with direct_async_client() as client_of_replica:
        assert (await client_of_replica.get(url)).is_success

    assert proxy.first_lines == []


def test_the_admin_token_passes_no_proxy(url: str, proxy: RecordingProxy, tmp_path: Path) -> None:
    assert AdminClient(StateDir(tmp_path), url, "token").adapters() == []
    assert proxy.first_lines == []


def test_a_server_that_answers_is_seen_at_once_where_a_proxy_is_set(url: str, proxy: RecordingProxy) -> None:
    _wait_until_answering(url)

    assert proxy.first_lines == []


def test_certificates_of_the_environment_still_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "absent.pem"))

    with pytest.raises(OSError, match="No such file"):
        direct_client()
