"""A cold request goes to the replica that holds its adapter, if that one isn't busier.

HAProxy picks a replica without knowing adapters. A replica that would have to push an adapter out, or let a request
wait for a slot, passes the request on to a holder: one more hop, for such requests only and never a second one.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import httpx
from starlette.types import Scope, Send

from serve.errors import ServeError, WrongReplica
from serve.names import AdapterRevision
from serve.reconcile import ReplicaReport

FORWARDED_HEADER = b"x-graft-forwarded"

FRESH_S = 1.0  # what is known of the others may be this old
_LOOPBACK = "127.0.0.1"
_ASK_TIMEOUT_S = 0.25
_CONNECT_TIMEOUT_S = 1.0
# A holder with up to this many requests more than twice ours is still better than a load.
_SPARE_REQUESTS = 4
_REQUEST_ID = b"x-request-id"  # Ray Serve adds it to every answer of every replica
_OF_ONE_HOP = frozenset({b"host", b"connection", b"keep-alive", b"transfer-encoding", b"te", b"upgrade"})


@dataclass(frozen=True)
class Holder:
    """Another replica, and where it listens."""

    replica: str
    address: str


@dataclass
class Peers:
    """What the other replicas hold, asked for when it matters and at most once a second."""

    replica: str
    host: str  # where the others reach this machine
    ask: Callable[[], Awaitable[Sequence[ReplicaReport]]]
    address: str | None = None
    passed_on: int = 0  # requests that another replica answered for this one
    _reports: Sequence[ReplicaReport] = ()
    _asked_s: float = -FRESH_S
    _asking: asyncio.Lock = field(default_factory=asyncio.Lock)
    _client: httpx.AsyncClient = field(
        default_factory=lambda: httpx.AsyncClient(
            timeout=httpx.Timeout(None, connect=_CONNECT_TIMEOUT_S), limits=httpx.Limits(max_connections=None)
        )
    )

    def listens_on(self, port: int) -> None:
        self.address = f"{self.host}:{port}"

    async def holder_of(self, adapter: AdapterRevision) -> Holder | None:
        """A replica that would run it at once; None if there is none, or nobody knows in time."""
        await self._refresh()
        own = next((it.running_requests for it in self._reports if it.replica == self.replica), 0)
        fit = [
            (it.running_requests, it.replica, it.address)
            for it in self._reports
            if it.address and it.replica != self.replica and adapter.engine_name in it.resident
            if not it.waiting_requests and it.running_requests <= 2 * own + _SPARE_REQUESTS
        ]
        if not fit:
            return None
        _, replica, address = min(fit)
        return Holder(replica, self._from_here(address))

    async def pass_on(self, holder: Holder, scope: Scope, body: bytes, send: Send) -> bool:
        """Have that replica answer; False if it can't, and nothing was sent yet."""
        request = self._client.build_request(
            "POST",
            httpx.URL(f"http://{holder.address}{scope['path']}", query=scope.get("query_string", b"")),
            headers=[
                *(it for it in scope["headers"] if it[0] not in _OF_ONE_HOP),
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
            self.passed_on += 1
            headers = [(name.lower(), value) for name, value in response.headers.raw]
            await send({
                "type": "http.response.start",
                "status": response.status_code,
                "headers": [it for it in headers if it[0] not in _OF_ONE_HOP and it[0] != _REQUEST_ID],
            })  # fmt: skip
            async for chunk in response.aiter_raw():
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        return True

    def _from_here(self, address: str) -> str:
        """On the same machine by loopback, as Ray Serve's proxy does: the replicas of a server that listens on
        loopback listen nowhere else."""
        host, _, port = address.rpartition(":")
        return f"{_LOOPBACK}:{port}" if host == self.host else address

    async def _refresh(self) -> None:
        async with self._asking:
            now = asyncio.get_running_loop().time()
            if now - self._asked_s < FRESH_S:
                return
            self._asked_s = now
            self._reports = ()
            with contextlib.suppress(ServeError, TimeoutError):
                async with asyncio.timeout(_ASK_TIMEOUT_S):
                    self._reports = await self.ask()


def forwarded_to(scope: Scope) -> bytes | None:
    """The replica that another one passed this request on to; None if it came from outside."""
    return next((value for name, value in scope["headers"] if name == FORWARDED_HEADER), None)


def check_meant(scope: Scope, replica: str | None) -> None:
    """Raises WrongReplica for a request that was passed on to another one than `replica`: ports are given away again,
    and who listens there now may be a replica of another server."""
    meant = forwarded_to(scope)
    if meant is not None and (replica is None or meant != replica.encode()):
        raise WrongReplica
