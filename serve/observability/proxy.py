"""What HAProxy itself answered, read from the socket on which it tells its statistics.

`serve/deployment/proxy/haproxy.sh` has it open that socket. A request that no replica saw is in no replica's
metrics: while none can be reached, HAProxy answers 503.
"""

from __future__ import annotations

import csv
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

FILE = "haproxy.stats"
_BACKENDS_AND_SERVERS = 2 + 4  # of all proxies, every server: -1
_QUESTION = f"show info;show stat -1 {_BACKENDS_AND_SERVERS} -1\n"
_READ_BYTES = 1 << 16
_BACKEND = "1"  # in the column `type`; a server is 2


@dataclass(frozen=True)
class ProxyCounts:
    """Requests since the process `pid` of HAProxy began."""

    pid: str
    requests: int  # for replicas; health checks, which HAProxy answers for itself, are none
    unanswered: int  # answered with a 5xx that came from no replica


@dataclass
class ProxyStatistics:
    """The counts of all processes that listened on `path`, one after the other: Ray Serve starts a new one whenever
    replicas come or go."""

    path: Path
    requests: int = 0
    unanswered: int = 0
    _current: ProxyCounts = field(default_factory=lambda: ProxyCounts("", 0, 0))

    def update(self, timeout_s: float) -> bool:
        """Ask HAProxy, which also may wait. Returns whether it answered."""
        try:
            counts = counts_of(read(self.path, _QUESTION.encode(), time.monotonic() + timeout_s))
        except (OSError, ValueError, KeyError):
            return False
        known = self._current if counts.pid == self._current.pid else ProxyCounts(counts.pid, 0, 0)
        # A request counts for the server a moment before the backend: a difference never takes anything back.
        self._current = ProxyCounts(
            counts.pid, max(known.requests, counts.requests), max(known.unanswered, counts.unanswered)
        )
        self.requests += self._current.requests - known.requests
        self.unanswered += self._current.unanswered - known.unanswered
        return True


def counts_of(answer: str) -> ProxyCounts:
    """Of what HAProxy answers to `show info;show stat`. Raises KeyError or ValueError if it is something else."""
    info, _, table = answer.partition("\n\n")
    facts = dict(line.split(": ", 1) for line in info.splitlines() if ": " in line)
    requests = unanswered = 0
    for row in csv.DictReader(_rows(table)):
        if row["type"] == _BACKEND:
            requests += int(row["req_tot"])
            unanswered += int(row["hrsp_5xx"])
        else:
            unanswered -= int(row["hrsp_5xx"])
    return ProxyCounts(facts["Pid"], requests, max(0, unanswered))


def _rows(table: str) -> Iterator[str]:
    lines = iter(table.strip().splitlines())
    yield next(lines, "").removeprefix("# ")
    yield from lines


def read(path: Path, question: bytes, deadline: float) -> str:
    """All that a Unix socket says until it is closed. Raises OSError, also when `deadline` has passed: a time of
    `time.monotonic`."""
    chunks: list[bytes] = []
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(max(0.001, deadline - time.monotonic()))
        connection.connect(str(path))
        connection.sendall(question)
        while chunk := connection.recv(_READ_BYTES):
            chunks.append(chunk)
            connection.settimeout(max(0.001, deadline - time.monotonic()))
    return b"".join(chunks).decode()
