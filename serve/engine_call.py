"""One request handed to the engine's own HTTP application: its body read whole, its `model` resolved, its
client's disconnect told to the engine, and a dead engine turned into a 503 that the proxy retries elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Any

import msgspec
from starlette.types import Message, Receive, Scope, Send

from serve.catalogue import Catalogue
from serve.engine import Engine
from serve.errors import BodyTooLarge, EngineUnavailable, InvalidBody, UnknownModel
from serve.names import AdapterRevision, RequestedModel
from serve.openai import error_response
from serve.residency import AdapterPool

MODEL_HEADER = b"x-graft-model"  # what answered: NAME@REVISION, or the base model

_DISCONNECT: Message = {"type": "http.disconnect"}
_ABORT_TIMEOUT_S = 2.0

# Only the top level is parsed: every value but `model` reaches the engine byte for byte.
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])
_string = msgspec.json.Decoder(str | None)


class EngineCall:
    """The ASGI endpoint of every engine route."""

    def __init__(
        self,
        engine: Engine,
        pool: AdapterPool,
        base_model: str,
        catalogue: Callable[[], Catalogue],
        max_body_bytes: int,
    ) -> None:
        self._engine = engine
        self._pool = pool
        self._base_model = base_model
        self._catalogue = catalogue
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._engine.is_dead:
            raise EngineUnavailable
        body = await read_body(receive, self._max_body_bytes)
        fields = parse_fields(body)
        adapter = self._resolve(requested_model(fields))
        if adapter is not None:
            body = msgspec.json.encode(fields | {"model": adapter.engine_name})
        async with self._resident(adapter):
            answered_by = adapter.engine_name if adapter else self._base_model
            await self._run(with_content_length(scope, len(body)), body, receive, saying(answered_by, send))

    def _resolve(self, model: str | None) -> AdapterRevision | None:
        if model is None or model == self._base_model:
            return None
        catalogue = self._catalogue()
        adapter = catalogue.resolve(RequestedModel.parse(model))
        if adapter is None:
            raise UnknownModel(model, {self._base_model, *(current.name for current in catalogue.current)})
        return adapter

    def _resident(self, adapter: AdapterRevision | None) -> AbstractAsyncContextManager[None]:
        return self._pool.use(adapter) if adapter else nullcontext()

    async def _run(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        client = Client(body, receive)
        guard = DeadEngineGuard(self._engine, send)
        running = asyncio.ensure_future(self._engine.api(scope, client.receive, guard.send))
        try:
            await asyncio.shield(running)
        except asyncio.CancelledError:
            # Ray Serve tells a disconnect by cancelling this task; vLLM waits for the http.disconnect message
            # and would let the request run to its end.
            client.left()
            await asyncio.wait({running}, timeout=_ABORT_TIMEOUT_S)
            running.cancel()
            raise


class Client:
    """The caller's side of a request whose body was already read."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive
        self._gone = asyncio.Event()

    def left(self) -> None:
        self._gone.set()

    async def receive(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        if self._gone.is_set():
            return _DISCONNECT
        message, gone = asyncio.ensure_future(self._receive()), asyncio.ensure_future(self._gone.wait())
        try:
            await asyncio.wait({message, gone}, return_when=asyncio.FIRST_COMPLETED)
            return message.result() if message.done() else _DISCONNECT
        finally:
            message.cancel()
            gone.cancel()


class DeadEngineGuard:
    """Replaces the 500 of an engine that died under the request by a 503. The proxy sends a 503 to another
    replica, and unlike a fast 500 it doesn't make the dead replica look like the least loaded one."""

    def __init__(self, engine: Engine, send: Send) -> None:
        self._engine = engine
        self._send = send
        self._replaced = False

    async def send(self, message: Message) -> None:
        starts = message["type"] == "http.response.start"
        if starts and message["status"] >= 500 and self._engine.is_dead:
            self._replaced = True
            await _send_unavailable(self._send)
        elif not self._replaced:
            await self._send(message)


def saying(model: str, send: Send) -> Send:
    """`send` with the header that tells what answered, whole or streaming."""

    async def told(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), (MODEL_HEADER, model.encode())]}
        await send(message)

    return told


async def _send_unavailable(send: Send) -> None:
    response = error_response(EngineUnavailable())
    await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
    await send({"type": "http.response.body", "body": response.body})


async def read_body(receive: Receive, limit_bytes: int) -> bytes:
    """The whole request body. Raises BodyTooLarge as soon as it is; a client that leaves ends the task."""
    pieces: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise asyncio.CancelledError
        piece = message.get("body", b"")
        size += len(piece)
        if size > limit_bytes:
            raise BodyTooLarge(limit_bytes)
        pieces.append(piece)
        if not message.get("more_body"):
            return b"".join(pieces)


def parse_fields(body: bytes) -> dict[str, Any]:
    """The top level of a JSON object, values unparsed. Raises InvalidBody."""
    with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError):
        return _fields.decode(body)
    raise InvalidBody("The request body must be a JSON object.")


def requested_model(fields: dict[str, Any]) -> str | None:
    """The `model` of a request; None where it is absent, which means the base model. Raises InvalidBody."""
    with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError):
        return _string.decode(fields["model"]) if "model" in fields else None
    raise InvalidBody("`model` must be a string.")


def with_content_length(scope: Scope, length: int) -> Scope:
    headers = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
    return {**scope, "headers": [*headers, (b"content-length", str(length).encode())]}
