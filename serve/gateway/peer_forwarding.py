"""Forwards a request to another replica that holds its adapter, if that replica isn't busier.

HAProxy picks a replica without knowing adapters. A replica that would have to evict an adapter, or to let the request
wait for an adapter slot, forwards the request to a holder of the adapter. That is one more hop, for such requests only,
and a forwarded request is not forwarded again.

A holder may have followed the catalogue further than the replica that forwards, or less far. Then it may not know the
revision that the other one has resolved the request to. It answers with its epoch, and the replica that forwards
catches up and resolves the request again.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import httpx
from starlette.types import Scope, Send

from serve.adapters.reconcile import ReplicaReport
from serve.errors import (
    CatalogueBehind,
    HolderLost,
    HolderTimeout,
    ServeError,
    StoreUnavailable,
    UnknownModel,
    WrongReplica,
)
from serve.follower.http_client import direct_async_client
from serve.names import AdapterRevision

FORWARDED_HEADER = b"x-graft-forwarded"
# How far a holder that doesn't know the revision of a forwarded request has followed the catalogue.
EPOCH_HEADER = "x-graft-epoch"

MAX_REPORT_AGE_S = 1.0
_LOOPBACK = "127.0.0.1"
_REPORT_TIMEOUT_S = 0.25
_CONNECT_TIMEOUT_S = 1.0
_FOLLOW_PAUSE_S = 0.1
# What a holder needs besides waiting for slots and running: to read the body, to count the caller's limits, and to
# abort a request that ran for too long.
GRACE_S = 10.0
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


@dataclass(frozen=True)
class ForwardLimits:
    """How long a holder may send nothing."""

    first_byte_s: float
    chunk_s: float  # between two chunks of an answer

    @classmethod
    def of(cls, max_wait_s: float, max_run_s: float) -> ForwardLimits:
        """No holder that works is silent for longer. A request waits there for an adapter slot and for the engine, and
        an answer that isn't streamed begins when it is complete. A stream, too, may pause while the engine runs other
        prompts or vLLM withholds the arguments of a tool call, but it ends within `max_run_s`."""
        return cls(2 * max_wait_s + max_run_s + GRACE_S, max_run_s + GRACE_S)


class RevisionUnknown(Exception):
    """The holder's catalogue, which it has followed up to `epoch`, hasn't the revision of the request."""

    def __init__(self, epoch: int) -> None:
        super().__init__(epoch)
        self.epoch = epoch


@dataclass
class Peers:
    """The other replicas, and which adapters they hold: fetched when a request needs it, at most once a second."""

    replica: str
    host: str  # where the other replicas reach this machine
    fetch_reports: Callable[[], Awaitable[Sequence[ReplicaReport]]]
    follow: Callable[[], Awaitable[None]]  # has this replica follow the catalogue
    address: str | None = None
    forwarded: int = 0  # requests that another replica answered for this one
    _reports: Sequence[ReplicaReport] = ()
    _fetched_s: float = -MAX_REPORT_AGE_S
    _fetching: asyncio.Lock = field(default_factory=asyncio.Lock)
    _following: asyncio.Lock = field(default_factory=asyncio.Lock)
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

    async def forward(self, holder: Holder, scope: Scope, body: bytes, send: Send, limits: ForwardLimits) -> bool:
        """Forwards the request to the holder. Returns whether the holder has answered; if not, nothing was sent to the
        client. Raises RevisionUnknown, or HolderTimeout before the answer has begun; HolderTimeout or HolderLost after
        it."""
        try:
            async with asyncio.timeout(limits.first_byte_s):
                response = await self._client.send(self._request(holder, scope, body), stream=True)
        except TimeoutError:
            raise HolderTimeout(limits.first_byte_s) from None
        except httpx.HTTPError:
            return False
        async with contextlib.aclosing(response):
            if response.status_code == 503:
                return False
            _check_revision_known(response)
            self.forwarded += 1
            headers = [(name.lower(), value) for name, value in response.headers.raw]
            await send({
                "type": "http.response.start",
                "status": response.status_code,
                "headers": [header for header in headers if header[0] not in _NOT_FORWARDED],
            })  # fmt: skip
            await _relay(response.aiter_raw(), send, limits.chunk_s)
        return True

    def _request(self, holder: Holder, scope: Scope, body: bytes) -> httpx.Request:
        return self._client.build_request(
            "POST",
            httpx.URL(f"http://{holder.address}{scope['path']}", query=scope.get("query_string", b"")),
            headers=[
                *((name, value) for name, value in scope["headers"] if name not in _HOP_BY_HOP),
                (FORWARDED_HEADER, holder.replica.encode()),
            ],
            content=body,
        )

    async def catch_up(self, epoch: int, reached: Callable[[], int], within_s: float) -> None:
        """Returns when the epoch that this replica has `reached` is `epoch` or a later one. Raises CatalogueBehind
        after `within_s`, or if the catalogue can't be read."""
        try:
            async with asyncio.timeout(within_s), self._following:
                while reached() < epoch:
                    await self.follow()
                    if reached() < epoch:
                        await asyncio.sleep(_FOLLOW_PAUSE_S)
        except (TimeoutError, StoreUnavailable) as error:
            raise CatalogueBehind(within_s) from error

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


def _check_revision_known(response: httpx.Response) -> None:
    epoch = response.headers.get(EPOCH_HEADER, "")
    if response.status_code == UnknownModel.status and epoch.isdecimal():
        raise RevisionUnknown(int(epoch))


async def _relay(chunks: AsyncIterator[bytes], send: Send, limit_s: float) -> None:
    """Sends the body of a holder's answer. Raises HolderTimeout or HolderLost, after which an event may be sent."""
    last = b""
    try:
        while chunk := await _next(chunks, limit_s):
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
            last = chunk
    except ServeError:
        if last and not last.endswith(b"\n\n"):  # an event was cut off
            await send({"type": "http.response.body", "body": b"\n\n", "more_body": True})
        raise
    await send({"type": "http.response.body", "body": b""})


async def _next(chunks: AsyncIterator[bytes], limit_s: float) -> bytes:
    """The next chunk; nothing after the last one. Raises HolderTimeout or HolderLost."""
    try:
        async with asyncio.timeout(limit_s):
            return await anext(chunks, b"")
    except TimeoutError:
        raise HolderTimeout(limit_s) from None
    except httpx.HTTPError as error:
        raise HolderLost from error


def forwarded_to(scope: Scope) -> bytes | None:
    """The replica that another one forwarded this request to; None if the request came from a client."""
    return next((value for name, value in scope["headers"] if name == FORWARDED_HEADER), None)


def check_addressed_to(scope: Scope, replica: str | None) -> None:
    """Raises WrongReplica for a request that was forwarded to another replica than `replica`. Ports are reused, so a
    replica of another server may listen now where the holder listened."""
    addressee = forwarded_to(scope)
    if addressee is not None and (replica is None or addressee != replica.encode()):
        raise WrongReplica
