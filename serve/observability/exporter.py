"""One scrape for all replicas of a node, in a process of its own, which outlives every replica, and Ray.

Each replica serves its metrics on a Unix socket (serve/deployment/metrics_socket.py). The exporter reads all sockets at
once, adds the label `replica` to every sample and groups the samples by metric. It also asks HAProxy, and reads the
files `*.prom` of the same directory. It merges texts: parsing them for an
application of prometheus_client would take ten times as long. If a replica does not answer in time, only its own series
are missing, and its `graft_replica_up` is 0.
"""

from __future__ import annotations

import contextlib
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
from serve.observability.metric_values import MetricFamilies
from serve.observability.metrics import (
    EXPIRY,
    PROXY_REQUESTS,
    PROXY_UNANSWERED,
    PROXY_UP,
    REPLICA_SCRAPE,
    REPLICA_UP,
    Spec,
)
from serve.observability.proxy import FILE, ProxyStatistics, read

DEFAULT_PORT = 9464  # the one that OpenTelemetry took for Prometheus exporters
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

SOCKET_SUFFIX, FINAL_SNAPSHOT_SUFFIX, TEXT_SUFFIX = ".sock", ".last", ".prom"
_FORGET_S = 600.0  # for this long a replica that ended is reported as down
_KEEP_FINAL_SNAPSHOT_S = 120.0  # and its final snapshot for this long: a few scrapes


@dataclass(frozen=True)
class ScrapeResult:
    """The metrics of one replica; `text` is None if it did not answer in time. `up`: its socket accepts connections."""

    replica: str
    text: str | None
    took_s: float
    up: bool


@dataclass
class Exporter:
    """`directory` holds the sockets; `certificates` are PEM files whose expiry is exported as well."""

    directory: Path
    certificates: Sequence[Path] = ()
    timeout_s: float = 2.0
    _gone: dict[Path, float] = field(default_factory=dict)  # since when nothing listens
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _proxy: ProxyStatistics = field(init=False)

    def __post_init__(self) -> None:
        self._proxy = ProxyStatistics(self.directory / FILE)

    def scrape(self) -> bytes:
        """The metrics of the node in Prometheus' text format."""
        paths = sorted(self.directory.glob(f"*{SOCKET_SUFFIX}"))
        with ThreadPoolExecutor(max_workers=max(1, len(paths))) as pool:
            results = list(pool.map(self._read_replica, paths))
        own = MetricFamilies({})
        for result in results:
            own.add(REPLICA_UP, (result.replica,), float(result.up))
            own.add(REPLICA_SCRAPE, (result.replica,), result.took_s)
        if self._proxy.path.exists():
            own.gauges(self._proxy_values())
        for path in self.certificates:
            if (end := not_after(path)) is not None:
                own.add(EXPIRY, ("certificate", path.name), end)
        texts = {result.replica: result.text for result in results if result.text is not None}
        texts[""] = generate_latest(_FamiliesRegistry(own)).decode() + self._of_other_processes()
        return merge(texts).encode()

    def _proxy_values(self) -> dict[Spec, float]:
        with self._lock:
            is_up = self._proxy.update(self.timeout_s)
            return {PROXY_UP: float(is_up), PROXY_REQUESTS: self._proxy.requests,
                    PROXY_UNANSWERED: self._proxy.unanswered}  # fmt: skip

    def _of_other_processes(self) -> str:
        """What processes that serve no metrics wrote, in the text format."""
        texts = []
        for path in sorted(self.directory.glob(f"*{TEXT_SUFFIX}")):
            with contextlib.suppress(OSError, UnicodeDecodeError):
                texts.append(path.read_text())
        return "".join(texts)

    def _read_replica(self, path: Path) -> ScrapeResult:
        began = time.monotonic()
        text, up = None, False
        try:
            text, up = read(path, b"", began + self.timeout_s), True
        except ConnectionRefusedError:
            text = final_snapshot(path)
            self._forget_later(path)
        except OSError:
            pass
        return ScrapeResult(path.name.removesuffix(SOCKET_SUFFIX), text, time.monotonic() - began, up)

    def _forget_later(self, path: Path) -> None:
        """A killed replica leaves its socket behind, and is reported as down for a while."""
        with self._lock:
            since = self._gone.setdefault(path, time.monotonic())
            if time.monotonic() - since > _FORGET_S:
                path.unlink(missing_ok=True)
                path.with_suffix(FINAL_SNAPSHOT_SUFFIX).unlink(missing_ok=True)
                del self._gone[path]


def final_snapshot(path: Path) -> str | None:
    """The last metrics of a replica that has ended; None if it left none, or they are too old. `path`: its socket."""
    file = path.with_suffix(FINAL_SNAPSHOT_SUFFIX)
    try:
        return file.read_text() if time.time() - file.stat().st_mtime < _KEEP_FINAL_SNAPSHOT_S else None
    except OSError:
        return None


def merge(texts: dict[str, str]) -> str:
    """Merge expositions by replica into one: samples of a metric together, each with its label `replica` ("": none)."""
    heads: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for replica, text in texts.items():
        for name, head, line in _lines(text):
            if head:
                if name not in samples:
                    heads[name], samples[name] = [], []
                if not any(known.split(" ", 2)[1] == head.split(" ", 2)[1] for known in heads[name]):
                    heads[name].append(head)
            else:
                samples.setdefault(name, []).append(labelled(line, replica) if replica else line)
    return "".join(f"{line}\n" for name, lines in samples.items() for line in (*heads.get(name, ()), *lines))


def labelled(sample: str, replica: str) -> str:
    """A sample line with one more label. A metric's name contains neither a brace nor a space, so the first of these
    ends the name."""
    value = replica.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    brace, space = sample.find("{"), sample.find(" ")
    if brace == -1 or space < brace:
        return f'{sample[:space]}{{replica="{value}"}}{sample[space:]}'
    comma = "" if sample.startswith("}", brace + 1) else ","
    return f'{sample[: brace + 1]}replica="{value}"{comma}{sample[brace + 1 :]}'


def _lines(text: str) -> Iterator[tuple[str, str, str]]:
    """The metric, its HELP or TYPE line or "", and a sample or ""."""
    name = ""
    for line in text.split("\n"):
        if line.startswith(("# HELP ", "# TYPE ")):
            name = line.split(" ", 3)[2]
            yield name, line, ""
        elif line and not line.startswith("#"):
            yield name, "", line


def not_after(path: Path) -> float | None:
    """When the certificate in a PEM file expires, in seconds since the epoch; None if there is none."""
    from cryptography import x509

    try:
        return x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc.timestamp()
    except (OSError, ValueError):
        return None


@dataclass(frozen=True)
class _FamiliesRegistry:
    families: MetricFamilies

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
            with contextlib.suppress(ConnectionError):  # the client has disconnected
                self.send_response(status)
                self.send_header("content-type", CONTENT_TYPE)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002  (http.server's name)
            """No line for each scrape."""

    try:
        return ThreadingHTTPServer((host, port), Handler)
    except OSError as error:
        raise PortInUse(f"Can't listen on {host}:{port}: {error.strerror}. Choose another with --port.") from error
