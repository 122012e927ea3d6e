from __future__ import annotations

import asyncio
import contextlib
import socket
import stat
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.deployment.proxy.uvicorn_patches import patch_uvicorn_startup
from tests.serve.fakes import respond


class Answering:
    """Waits with its answers until it may go on."""

    def __init__(self) -> None:
        self.began, self.may_go_on = asyncio.Event(), asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.began.set()
        await self.may_go_on.wait()
        await respond(send, 200, b'"here"')


def served(app: ASGIApp) -> tuple[uvicorn.Server, asyncio.Task[None], int]:
    """As Ray Serve does it."""
    bound = socket.socket()
    bound.bind(("127.0.0.1", 0))
    port = bound.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, port=port, lifespan="off", log_config=None))
    return server, asyncio.create_task(server.serve(sockets=[bound])), port


@contextlib.asynccontextmanager
async def talking(app: Talking) -> AsyncIterator[int]:
    """Its port."""
    patch_uvicorn_startup("r1", lambda _: None)
    server, serving, port = served(app)
    try:
        while not server.started:  # noqa: ASYNC110  (uvicorn sets a flag)
            await asyncio.sleep(0.01)
        yield port
    finally:
        server.should_exit = True
        await serving


def through(path: Path) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(uds=str(path)), base_url="http://replica")


async def test_a_server_tells_its_port_and_listens_on_a_socket_of_its_replica_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAFT_SOCKETS", str(tmp_path / "sockets"))
    app, ports, usual = Answering(), asyncio.Queue[int](), uvicorn.Server.startup
    app.may_go_on.set()
    patch_uvicorn_startup("r1", ports.put_nowait)
    server, serving, port = served(app)

    assert await ports.get() == port
    async with httpx.AsyncClient() as over_tcp, through(tmp_path / "sockets" / "r1.sock") as over_socket:
        while not server.started:  # noqa: ASYNC110  (uvicorn sets a flag)
            await asyncio.sleep(0.01)
        answers = [await over_tcp.get(f"http://127.0.0.1:{port}/"), await over_socket.get("/")]
        server.should_exit = True
        await serving

    assert [answer.text for answer in answers] == ['"here"', '"here"']
    assert stat.S_IMODE((tmp_path / "sockets").stat().st_mode) == 0o700
    assert uvicorn.Server.startup is usual, "the next server is nobody's business"


async def test_a_server_that_ends_finishes_what_came_through_the_socket_and_takes_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAFT_SOCKETS", str(tmp_path))
    app, ports = Answering(), asyncio.Queue[int]()
    patch_uvicorn_startup("r1", ports.put_nowait)
    server, serving, _ = served(app)
    await ports.get()
    async with through(tmp_path / "r1.sock") as client, through(tmp_path / "r1.sock") as late:
        under_way = asyncio.create_task(client.get("/"))
        await app.began.wait()
        server.should_exit = True
        await asyncio.sleep(0.3)
        with pytest.raises(httpx.ConnectError):
            await late.get("/")
        assert not serving.done()
        app.may_go_on.set()

        assert (await under_way).text == '"here"'
        await serving


class Talking:
    """Says many pieces without waiting for anything but its reader."""

    def __init__(self, piece: bytes, count: int, works_s: float = 0) -> None:
        self.piece, self.count, self.works_s, self.said = piece, count, works_s, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200})
        while self.said < self.count:
            await send({"type": "http.response.body", "body": self.piece, "more_body": True})
            self.said += 1
            time.sleep(self.works_s)  # noqa: ASYNC251  (as an event loop does that is busy with other answers)
        await send({"type": "http.response.body"})


def first_read(address: tuple[str, int] | str) -> bytes:
    """What there is when there is anything."""
    with socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET) as caller:
        caller.connect(address)
        caller.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        return caller.recv(100_000)


@pytest.mark.parametrize("where", ["port", "socket"])
async def test_pieces_of_a_moment_leave_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    monkeypatch.setenv("GRAFT_SOCKETS", str(tmp_path))
    async with talking(Talking(b"piece ", 3, works_s=0.05)) as port:
        address = ("127.0.0.1", port) if where == "port" else str(tmp_path / "r1.sock")
        read = await asyncio.to_thread(first_read, address)

    assert read.count(b"piece ") == 3
    assert read.endswith(b"0\r\n\r\n")


async def test_who_says_much_waits_for_a_reader_that_takes_nothing() -> None:
    app = Talking(b"x" * (1 << 20), 100)
    async with talking(app) as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1)
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        await asyncio.sleep(0.5)
        said = app.said
        writer.transport.abort()

    assert 0 < said < 50


async def test_without_a_directory_for_sockets_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRAFT_SOCKETS", raising=False)
    monkeypatch.chdir(tmp_path)
    ports = asyncio.Queue[int]()
    patch_uvicorn_startup("r1", ports.put_nowait)
    server, serving, port = served(Answering())

    assert await ports.get() == port
    server.should_exit = True
    await serving
    assert list(tmp_path.iterdir()) == []  # noqa: ASYNC240
