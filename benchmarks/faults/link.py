"""A connection between the server and what it stands on, that can be slowed, broken and swallowed."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from typing import Literal

Mode = Literal["open", "slow", "failing", "silent", "gone"]

_PIECE = 1 << 16
_FAILURE = b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class Link:
    """A port of this machine that leads to `target` (HOST:PORT, or the path of a socket), in a thread of its own.

    `slow` holds every piece for `delay_s`, `failing` answers everything with HTTP's 503, `silent` takes what is sent
    and says nothing, `gone` resets every connection.
    """

    def __init__(self, target: str, delay_s: float = 1.0) -> None:
        self._target = target
        self._delay_s = delay_s
        self._mode: Mode = "open"
        self._open: set[asyncio.StreamWriter] = set()
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
    def being(self, mode: Mode) -> Iterator[None]:
        """For as long as this lasts; what was connected before is broken off at both ends of it."""
        self._become(mode)
        try:
            yield
        finally:
            self._become("open")

    def _become(self, mode: Mode) -> None:
        def change() -> None:
            self._mode = mode
            for writer in list(self._open):
                writer.transport.abort()

        self._loop.call_soon_threadsafe(change)

    def _run(self) -> None:
        self._loop.run_until_complete(self._serve())
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._listening.set()
        await self._ended.wait()
        server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        try:
            if self._mode == "gone":
                writer.transport.abort()
            elif self._mode == "silent":
                while await reader.read(_PIECE):
                    pass
            elif self._mode == "failing":
                await reader.read(_PIECE)
                writer.write(_FAILURE)
                await writer.drain()
            else:
                await self._pass_on(reader, writer)
        except OSError:
            pass  # either end may be gone: that is the point
        finally:
            self._open.discard(writer)
            writer.close()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = self._target.rpartition(":")
        far_reader, far_writer = (
            await asyncio.open_connection(host, int(port)) if host else await asyncio.open_unix_connection(self._target)
        )
        self._open.add(far_writer)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._carry(reader, far_writer))
                group.create_task(self._carry(far_reader, writer))
        except* OSError:
            pass
        finally:
            self._open.discard(far_writer)
            far_writer.close()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while piece := await reader.read(_PIECE):
            if self._mode == "slow":
                await asyncio.sleep(self._delay_s)
            writer.write(piece)
            await writer.drain()
        writer.transport.abort() if self._mode != "open" else writer.close()
