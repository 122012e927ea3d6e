"""Forwards a request to another replica that holds its adapter, if that replica isn't busier.

HAProxy picks a replica without knowing adapters. A replica that would have to evict an adapter, or to let the request
wait for an adapter slot, forwards the request to a holder of the adapter. That is one more hop, for such requests only,
and a forwarded request is not forwarded again.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import httpx
from starlette.types import Scope, Send

from serve.adapters.reconcile import ReplicaReport
from serve.errors import ServeError, WrongReplica
from serve.follower.http_client import direct_async_client
from serve.names import AdapterRevision

FORWARDED_HEADER = b"x-graft-forwarded"

MAX_REPORT_AGE_S = 1.0
_LOOPBACK = "127.0.0.1"
_REPORT_TIMEOUT_S = 0.25
_CONNECT_TIMEOUT_S = 1.0
# A holder may have twice the requests of this replica and this many more: loading the adapter here would cost more than
# the longer wait there.
_SPARE_REQUESTS = 4
_HOP_BY_HOP = frozenset({b"host", b"connection", b"keep-alive", b"transfer-encoding", b"te", b"upgrade"})
# Of a response: Ray Serve and uvicorn add these to the response of every replica.
_NOT_FORWARDED = _HOP_BY_HOP | {b"x-request-id", b"date", b"server"}


@dataclass(frozen=True)
class Holder:
    """A replica that holds an adapter, and the HOST:PORT where it listens."""

    replica: str
    address: str


@dataclass
class Peers:
    """The other replicas, and which adapters they hold: fetched when a request needs it, at most once a second."""

    replica: str
    host: str  # where the other replicas reach this machine
    fetch_reports: Callable[[], Awaitable[Sequence[ReplicaReport]]]
    address: str | None = None
    forwarded: int = 0  # requests that another replica answered for this one
    _reports: Sequence[ReplicaReport] = ()
    _fetched_s: float = -MAX_REPORT_AGE_S
    _fetching: asyncio.Lock = field(default_factory=asyncio.Lock)
    _client: httpx.AsyncClient = field(
        default_factory=lambda: direct_async_client(
            timeout=httpx.Timeout(None, connect=_CONNECT_TIMEOUT_S), limits=httpx.Limits(max_connections=None)
        )
    )

    def listens_on(self, port: int) -> None:
        self.address = f"{self.host}:{port}"

    async def holder_of(self, adapter: AdapterRevision) -> Holder | None:
        """A replica that would run a request of the adapter at once; None if there is none, or if the reports don't
        come in time."""
        await self._refresh()
        own_requests = next((report.running_requests for report in self._reports if report.replica == self.replica), 0)
        candidates = [
            (report.running_requests, report.replica, report.address)
            for report in self._reports
            if report.address and report.replica != self.replica and adapter.engine_name in report.resident
            if not report.waiting_requests and report.running_requests <= 2 * own_requests + _SPARE_REQUESTS
        ]
        if not candidates:
            return None
        _, replica, address = min(candidates)
        return Holder(replica, self._reachable_address(address))

    async def forward(self, holder: Holder, scope: Scope, body: bytes, send: Send) -> bool:
        """Forwards the request to the holder. Returns whether the holder has answered; if not, nothing was sent to the
        client."""
        request = self._client.build_request(
            "POST",
            httpx.URL(f"http://{holder.address}{scope['path']}", query=scope.get("query_string", b"")),
            headers=[
                *((name, value) for name, value in scope["headers"] if name not in _HOP_BY_HOP),
                (FORWARDED_HEADER, holder.replica.encode()),
            ],
            content=body,
        )
        try:
            response = await self._client.send(request, stream=True)
        except httpx.HTTPError:
            return False
        async with contextlib.aclosing(response):
            if response.status_code == 503:
                return False
            self.forwarded += 1
            headers = [(name.lower(), value) for name, value in response.headers.raw]
            await send({
                "type": "http.response.start",
                "status": response.status_code,
                "headers": [header for header in headers if header[0] not in _NOT_FORWARDED],
            })  # fmt: skip
            async for chunk in response.aiter_raw():
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        return True

    def _reachable_address(self, address: str) -> str:
        """The loopback address for a replica on the same machine, as Ray Serve's proxy uses: the replicas of a server
        that listens on loopback listen nowhere else."""
        host, _, port = address.rpartition(":")
        return f"{_LOOPBACK}:{port}" if host == self.host else address

    async def _refresh(self) -> None:
        async with self._fetching:
            now = asyncio.get_running_loop().time()
            if now - self._fetched_s < MAX_REPORT_AGE_S:
                return
            self._fetched_s = now
            self._reports = ()
            with contextlib.suppress(ServeError, TimeoutError):
                async with asyncio.timeout(_REPORT_TIMEOUT_S):
                    self._reports = await self.fetch_reports()


def forwarded_to(scope: Scope) -> bytes | None:
    """The replica that another one forwarded this request to; None if the request came from a client."""
    return next((value for name, value in scope["headers"] if name == FORWARDED_HEADER), None)


def check_addressed_to(scope: Scope, replica: str | None) -> None:
    """Raises WrongReplica for a request that was forwarded to another replica than `replica`. Ports are reused, so a
    replica of another server may listen now where the holder listened."""
    addressee = forwarded_to(scope)
    if addressee is not None and (replica is None or addressee != replica.encode()):
        raise WrongReplica
