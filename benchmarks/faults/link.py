"""A TCP proxy between the server and a service it uses, which can delay, fail, swallow or reset connections."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from typing import Literal

Mode = Literal["open", "slow", "failing", "silent", "gone"]

_CHUNK_BYTES = 1 << 16
_FAILURE = b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class Link:
    """Forwards a port of this machine to `target` (HOST:PORT, or the path of a Unix socket), in a thread of its own.

    `slow` delays every chunk by `delay_s`, `failing` answers with HTTP's 503, `silent` reads and never answers, `gone`
    resets every connection.
    """

    def __init__(self, target: str, delay_s: float = 1.0) -> None:
        self._target = target
        self._delay_s = delay_s
        self._mode: Mode = "open"
        self._connections: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._ended = asyncio.Event()
        self._listening = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.port = 0

    def start(self) -> None:
        self._thread.start()
        self._listening.wait(10)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join(10)

    @contextlib.contextmanager
    def in_mode(self, mode: Mode) -> Iterator[None]:
        """Work in this mode until the context ends; each change of mode resets the open connections."""
        self._set_mode(mode)
        try:
            yield
        finally:
            self._set_mode("open")

    def _set_mode(self, mode: Mode) -> None:
        def change() -> None:
            self._mode = mode
            for writer in list(self._connections):
                writer.transport.abort()

        self._loop.call_soon_threadsafe(change)

    def _run(self) -> None:
        self._loop.run_until_complete(self._serve())
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._handle, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._listening.set()
        await self._ended.wait()
        server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.add(writer)
        try:
            if self._mode == "gone":
                writer.transport.abort()
            elif self._mode == "silent":
                while await reader.read(_CHUNK_BYTES):
                    pass
            elif self._mode == "failing":
                await reader.read(_CHUNK_BYTES)
                writer.write(_FAILURE)
                await writer.drain()
            else:
                await self._relay(reader, writer)
        except OSError:
            pass  # either end may have closed the connection, as the modes intend
        finally:
            self._connections.discard(writer)
            writer.close()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = self._target.rpartition(":")
        upstream_reader, upstream_writer = (
            await asyncio.open_connection(host, int(port)) if host else await asyncio.open_unix_connection(self._target)
        )
        self._connections.add(upstream_writer)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._forward(reader, upstream_writer))
                group.create_task(self._forward(upstream_reader, writer))
        except* OSError:
            pass
        finally:
            self._connections.discard(upstream_writer)
            upstream_writer.close()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while chunk := await reader.read(_CHUNK_BYTES):
            if self._mode == "slow":
                await asyncio.sleep(self._delay_s)
            writer.write(chunk)
            await writer.drain()
        writer.transport.abort() if self._mode != "open" else writer.close()
