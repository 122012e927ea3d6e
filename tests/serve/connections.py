"""A gateway that knows its callers on real connections to a real uvicorn, which a test writes to byte by byte."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import uvicorn
from ray.serve._private.http_util import parse_disconnect_disabled_header
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.catalogue.adapter_store import AdapterStore
from tests.serve.fakes import FakeEngine
from tests.serve.guarded import BASE_MODEL, Guarded, guarded_gateway, until

Started = Callable[..., contextlib.AbstractAsyncContextManager["Server"]]


@dataclass
class Server:
    guarded: Guarded
    address: tuple[str, int]
    secret: str
    more_headers: str = ""

    def is_idle(self) -> bool:
        policy = self.guarded.gateway.policy
        return not (policy.engine_queue.running or policy.limiter.running or policy.slow_clients.guarded_responses)

    def request(self, body: bytes, length: int | None = None) -> bytes:
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: graft\r\nauthorization: Bearer {self.secret}\r\n"
            f"content-length: {len(body) if length is None else length}\r\n{self.more_headers}\r\n"
        )
        return head.encode() + body

    @contextlib.asynccontextmanager
    async def connection(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        reader, writer = await asyncio.open_connection(*self.address)
        try:
            yield reader, writer
        finally:
            writer.transport.abort()


BODY = json.dumps({"model": BASE_MODEL, "prompt": "hi"}).encode()


@contextlib.asynccontextmanager
async def http(app: ASGIApp) -> AsyncIterator[tuple[str, int]]:
    """Cancels a request whose caller has left, as Ray Serve does if no header forbids it, and as uvicorn alone
    doesn't."""

    async def as_ray_serve(scope: Scope, receive: Receive, send: Send) -> None:
        if parse_disconnect_disabled_header(dict(scope["headers"])):
            with contextlib.suppress(asyncio.CancelledError):
                await app(scope, receive, send)
            return
        messages: asyncio.Queue[object] = asyncio.Queue()

        async def fetch() -> None:
            while True:
                message = await receive()
                await messages.put(message)
                if message["type"] == "http.disconnect":
                    return

        fetching = asyncio.create_task(fetch())
        running = asyncio.create_task(app(scope, messages.get, send))  # type: ignore[arg-type]
        await asyncio.wait({fetching, running}, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            fetching.cancel()
        else:
            running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running

    listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
    config = uvicorn.Config(as_ray_serve, lifespan="off", log_level="critical", timeout_keep_alive=60)
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    await until(lambda: server.started)
    try:
        yield listener.getsockname()
    finally:
        server.should_exit = server.force_exit = True
        await serving


@pytest.fixture(params=["", "x-request-disconnect-disabled: ?1\r\n"], ids=["ray-serve-cancels", "ray-serve-does-not"])
def start(request: pytest.FixtureRequest, engine: FakeEngine, store: AdapterStore, tmp_path: Path) -> Started:
    @contextlib.asynccontextmanager
    async def start(**settings: object) -> AsyncIterator[Server]:
        guarded = await guarded_gateway(tmp_path, store, engine, **settings)
        guarded.key("team-a", limits={"concurrent_requests": 10_000})
        async with http(guarded.gateway) as address:
            yield Server(guarded, address, guarded.secrets["team-a"], request.param)

    return start
