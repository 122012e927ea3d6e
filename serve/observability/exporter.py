"""One scrape for all replicas of a node, by a process of its own: it outlives every replica, and Ray.

Each replica tells its metrics on a Unix socket (`serve.exposition`). The exporter asks all of them at once, adds
`replica` to every sample and puts samples of one metric together. A replica that doesn't answer in time costs its own
series: `graft_replica_up` is 0, nobody waits longer.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from prometheus_client import generate_latest
from prometheus_client.core import Metric

from serve.errors import PortInUse
from serve.metrics import EXPIRY, REPLICA_SCRAPE, REPLICA_UP, Families

DEFAULT_PORT = 9464  # the one that OpenTelemetry took for Prometheus exporters
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SUFFIX, _LAST_WORDS = ".sock", ".last"  # serve.exposition's, without its imports
_READ_BYTES = 1 << 16
_FORGET_S = 600.0  # a replica that is gone is told as down for as long
_LAST_WORDS_S = 120.0  # and what it said at its end for as long: a few scrapes


@dataclass(frozen=True)
class Told:
    """What one replica said; None: nothing in time. `up`: it is there to be asked."""

    replica: str
    text: str | None
    took_s: float
    up: bool


@dataclass
class Exporter:
    """`directory` holds the sockets; `certificates` are files whose end is told as well."""

    directory: Path
    certificates: Sequence[Path] = ()
    timeout_s: float = 2.0
    _gone: dict[Path, float] = field(default_factory=dict)  # since when nobody listens
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def scrape(self) -> bytes:
        """The metrics of the node in Prometheus' text format."""
        paths = sorted(self.directory.glob(f"*{_SUFFIX}"))
        with ThreadPoolExecutor(max_workers=max(1, len(paths))) as pool:
            told = list(pool.map(self._ask, paths))
        own = Families({})
        for it in told:
            own.add(REPLICA_UP, (it.replica,), float(it.up))
            own.add(REPLICA_SCRAPE, (it.replica,), it.took_s)
        for path in self.certificates:
            if (end := not_after(path)) is not None:
                own.add(EXPIRY, ("certificate", path.name), end)
        texts = {it.replica: it.text for it in told if it.text is not None}
        return merge({**texts, "": generate_latest(_Collected(own)).decode()}).encode()

    def _ask(self, path: Path) -> Told:
        began = time.monotonic()
        text, up = None, False
        try:
            text, up = _read(path, began + self.timeout_s), True
        except ConnectionRefusedError:
            text = last_words(path)
            self._forget_later(path)
        except OSError:
            pass
        return Told(path.name.removesuffix(_SUFFIX), text, time.monotonic() - began, up)

    def _forget_later(self, path: Path) -> None:
        """A killed replica leaves its socket behind. It is told as down for a while, for whoever wants to know."""
        with self._lock:
            since = self._gone.setdefault(path, time.monotonic())
            if time.monotonic() - since > _FORGET_S:
                path.unlink(missing_ok=True)
                path.with_suffix(_LAST_WORDS).unlink(missing_ok=True)
                del self._gone[path]


def last_words(path: Path) -> str | None:
    """What the replica whose socket this was left to be told, while that is new."""
    file = path.with_suffix(_LAST_WORDS)
    try:
        return file.read_text() if time.time() - file.stat().st_mtime < _LAST_WORDS_S else None
    except OSError:
        return None


def merge(texts: dict[str, str]) -> str:
    """Expositions by replica as one: samples of a metric together, each with its `replica`; "" adds none."""
    heads: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for replica, text in texts.items():
        for name, head, line in _lines(text):
            if head:
                if name not in samples:
                    heads[name], samples[name] = [], []
                if not any(it.split(" ", 2)[1] == head.split(" ", 2)[1] for it in heads[name]):
                    heads[name].append(head)
            else:
                samples.setdefault(name, []).append(labelled(line, replica) if replica else line)
    return "".join(f"{line}\n" for name, lines in samples.items() for line in (*heads.get(name, ()), *lines))


def labelled(sample: str, replica: str) -> str:
    """A sample line with one more label. A metric's name holds neither a brace nor a space, so the first of them ends
    it."""
    value = replica.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    brace, space = sample.find("{"), sample.find(" ")
    if brace == -1 or space < brace:
        return f'{sample[:space]}{{replica="{value}"}}{sample[space:]}'
    comma = "" if sample.startswith("}", brace + 1) else ","
    return f'{sample[: brace + 1]}replica="{value}"{comma}{sample[brace + 1 :]}'


def _lines(text: str) -> Iterator[tuple[str, str, str]]:
    """Metric, its HELP or TYPE line, or a sample."""
    name = ""
    for line in text.split("\n"):
        if line.startswith(("# HELP ", "# TYPE ")):
            name = line.split(" ", 3)[2]
            yield name, line, ""
        elif line and not line.startswith("#"):
            yield name, "", line


def _read(path: Path, deadline: float) -> str:
    pieces: list[bytes] = []
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(max(0.001, deadline - time.monotonic()))
        connection.connect(str(path))
        while piece := connection.recv(_READ_BYTES):
            pieces.append(piece)
            connection.settimeout(max(0.001, deadline - time.monotonic()))
    return b"".join(pieces).decode()


def not_after(path: Path) -> float | None:
    """When the certificate in a PEM file expires, in seconds since the epoch; None if there is none."""
    from cryptography import x509

    try:
        return x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc.timestamp()
    except (OSError, ValueError):
        return None


@dataclass(frozen=True)
class _Collected:
    families: Families

    def collect(self) -> Iterable[Metric]:
        return self.families


def listen(exporter: Exporter, host: str, port: int) -> ThreadingHTTPServer:
    """A server of GET /metrics and /health that has its port. Raises PortInUse."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if self.path.partition("?")[0] == "/metrics":
                self._answer(200, exporter.scrape())
            elif self.path == "/health":
                self._answer(200, b"ok\n")
            else:
                self._answer(404, b"GET /metrics\n")

        def _answer(self, status: int, body: bytes) -> None:
            with contextlib.suppress(ConnectionError):  # who asked has left
                self.send_response(status)
                self.send_header("content-type", CONTENT_TYPE)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002  (http.server's name)
            """Nobody wants a line for each scrape."""

    try:
        return ThreadingHTTPServer((host, port), Handler)
    except OSError as error:
        raise PortInUse(f"Can't listen on {host}:{port}: {error.strerror}. Choose another with --port.") from error
