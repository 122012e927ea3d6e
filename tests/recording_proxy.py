"""A proxy that the environment names, and that answers nothing: a request that would go through it is noticed."""

from __future__ import annotations

import contextlib
import socketserver
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

_VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")


@dataclass
class RecordingProxy:
    port: int
    first_lines: list[bytes] = field(default_factory=list)  # one for each connection

    @property
    def variables(self) -> dict[str, str]:
        """For the environment of who might use it."""
        excepted = dict.fromkeys(("NO_PROXY", "no_proxy"), "")
        return dict.fromkeys(_VARIABLES, f"http://127.0.0.1:{self.port}") | excepted


@contextlib.contextmanager
def recording_proxy() -> Iterator[RecordingProxy]:
    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            proxy.first_lines.append(b"")
            proxy.first_lines[-1] = self.rfile.readline()

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        proxy = RecordingProxy(server.server_address[1])
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield proxy
        server.shutdown()
