"""Forwards a request to a replica, and streams the answer back: one more hop, for such requests only.

A forwarded request is not forwarded again. The other replica may have followed the catalogue further than the replica
that forwards, or less far. Then it may not know the model. It answers with its epoch, and the replica that forwards
catches up and resolves the request again.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass

import httpx
from starlette.types import Scope, Send

from serve.errors import HolderLost, HolderTimeout, ServeError, UnknownModel, WrongReplica
from serve.follower.http_client import direct_async_client

FORWARDED_HEADER = b"x-graft-forwarded"
# In a response: how far a replica that doesn't know the model of a forwarded request has followed the catalogue. In a
# request to another pool: how far the replica that forwards it has.
EPOCH_HEADER = "x-graft-epoch"

_CONNECT_TIMEOUT_S = 1.0
# What a replica needs besides waiting for slots and running: to read the body, to count the caller's limits, and to
# abort a request that ran for too long.
GRACE_S = 10.0
_HOP_BY_HOP = frozenset({b"host", b"connection", b"keep-alive", b"transfer-encoding", b"te", b"upgrade"})
# Of a response: Ray Serve and uvicorn add these to the response of every replica.
_NOT_FORWARDED = _HOP_BY_HOP | {b"x-request-id", b"date", b"server"}


@dataclass(frozen=True)
class ForwardTarget:
    """A replica, the HOST:PORT where it listens, and what its paths begin with."""

    replica: str
    address: str
    path_prefix: str = ""


@dataclass(frozen=True)
class ForwardLimits:
    """How long the other replica may send nothing."""

    first_byte_s: float
    chunk_s: float  # between two chunks of an answer

    @classmethod
    def of(cls, max_wait_s: float, max_run_s: float) -> ForwardLimits:
        """No replica that works is silent for longer. A request waits there for an adapter slot and for the engine, and
        an answer that isn't streamed begins when it is complete. A stream, too, may pause while the engine runs other
        prompts or vLLM withholds the arguments of a tool call, but it ends within `max_run_s`."""
        return cls(2 * max_wait_s + max_run_s + GRACE_S, max_run_s + GRACE_S)


class RevisionUnknown(Exception):
    """The other replica's catalogue, which it has followed up to `epoch`, hasn't the model of the request."""

    def __init__(self, epoch: int) -> None:
        super().__init__(epoch)
        self.epoch = epoch


class Forwarder:
    """The HTTP client of a replica for all others."""

    def __init__(self) -> None:
        self.forwarded = 0  # requests that another replica answered
        self._client = direct_async_client(
            timeout=httpx.Timeout(None, connect=_CONNECT_TIMEOUT_S), limits=httpx.Limits(max_connections=None)
        )

    async def forward(
        self,
        target: ForwardTarget,
        scope: Scope,
        body: bytes,
        send: Send,
        limits: ForwardLimits,
        *,
        headers: Iterable[tuple[bytes, bytes]] = (),
        relays_503: bool = False,
    ) -> bool:
        """Forwards the request, with further `headers`. Returns whether the target has answered; if not, nothing was
        sent to the client. A 503 is no answer unless `relays_503`. Raises RevisionUnknown, or HolderTimeout before the
        answer has begun; HolderTimeout or HolderLost after it."""
        try:
            async with asyncio.timeout(limits.first_byte_s):
                response = await self._client.send(self._request(target, scope, body, headers), stream=True)
        except TimeoutError:
            raise HolderTimeout(limits.first_byte_s) from None
        except httpx.HTTPError:
            return False
        async with contextlib.aclosing(response):
            if response.status_code == 503 and not relays_503:
                return False
            _check_revision_known(response)
            self.forwarded += 1
            lower = [(name.lower(), value) for name, value in response.headers.raw]
            await send({
                "type": "http.response.start",
                "status": response.status_code,
                "headers": [header for header in lower if header[0] not in _NOT_FORWARDED],
            })  # fmt: skip
            await _relay(response.aiter_raw(), send, limits.chunk_s)
        return True

    def _request(
        self, target: ForwardTarget, scope: Scope, body: bytes, headers: Iterable[tuple[bytes, bytes]]
    ) -> httpx.Request:
        url = f"http://{target.address}{target.path_prefix}{scope['path']}"
        return self._client.build_request(
            "POST",
            httpx.URL(url, query=scope.get("query_string", b"")),
            headers=[
                *((name, value) for name, value in scope["headers"] if name not in _HOP_BY_HOP),
                (FORWARDED_HEADER, target.replica.encode()),
                *headers,
            ],
            content=body,
        )


def _check_revision_known(response: httpx.Response) -> None:
    epoch = response.headers.get(EPOCH_HEADER, "")
    if response.status_code == UnknownModel.status and epoch.isdecimal():
        raise RevisionUnknown(int(epoch))


async def _relay(chunks: AsyncIterator[bytes], send: Send, limit_s: float) -> None:
    """Sends the body of another replica's answer. Raises HolderTimeout or HolderLost, after which an event may be
    sent."""
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
    return _header(scope, FORWARDED_HEADER)


def senders_epoch(scope: Scope) -> int:
    """How far the replica that forwarded this request has followed the catalogue; 0 if it does not say that."""
    value = _header(scope, EPOCH_HEADER.encode()) or b""
    return int(value) if value.isdigit() else 0


def check_addressed_to(scope: Scope, replica: str | None) -> None:
    """Raises WrongReplica for a request that was forwarded to another replica than `replica`. Ports are reused, so a
    replica of another server may listen now where that one listened."""
    addressee = forwarded_to(scope)
    if addressee is not None and (replica is None or addressee != replica.encode()):
        raise WrongReplica


def _header(scope: Scope, name: bytes) -> bytes | None:
    return next((value for known, value in scope["headers"] if known == name), None)
