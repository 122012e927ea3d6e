"""Everything that Graft changes in uvicorn, the HTTP server that Ray Serve starts in a replica that is ready.

- The server listens on a Unix socket beside its port. That is less work for it and for the proxy of the same machine,
  which exchange every chunk of a response. `haproxy.sh` finds the socket by the replica's id.
- The server coalesces the writes of one turn of the event loop. A step of the engine produces one token for each of
  its requests. Written one by one, each token would wake the proxy, which takes time from the replica where no core
  is free. Held until the end of the turn, the chunks of a step are written one after the other, and those of one
  response as one chunk.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn

# Names the directory of the sockets; without it there are none. Who can reach the sockets can bypass the proxy.
_SOCKETS_VARIABLE = "GRAFT_SOCKETS"
# A transport that holds more writes it immediately: the back pressure of a slow client must reach the application.
_MAX_HELD_BYTES = 64 << 10

# A protocol class of uvicorn's; its instances are created with keyword arguments.
ProtocolClass = Callable[..., asyncio.Protocol]


def patch_uvicorn_startup(replica: str, on_port: Callable[[int], None]) -> None:
    """Change the start of the next server of this process: it reports its port to `on_port`, coalesces its writes and
    listens on a socket as well. It remains one server, which finishes the requests of port and socket when it ends.

    Raises RuntimeError, here or when the server starts, if this uvicorn has not the names that are changed or read."""
    _require(uvicorn.Server, "startup")
    original = uvicorn.Server.startup

    async def startup(server: uvicorn.Server, sockets: list[socket.socket] | None = None) -> None:
        uvicorn.Server.startup = original  # type: ignore[method-assign]
        _require(server.config, "http_protocol_class", "port", "backlog")
        server.config.http_protocol_class = with_write_coalescing(server.config.http_protocol_class)  # type: ignore[assignment]
        await original(server, sockets)
        on_port(server.config.port)
        if directory := os.environ.get(_SOCKETS_VARIABLE):
            _require(server, "servers", "server_state", "lifespan")
            server.servers.append(await _listen(server, Path(directory) / f"{replica}.sock"))

    uvicorn.Server.startup = startup  # type: ignore[assignment,method-assign]


def _require(owner: object, *names: str) -> None:
    missing = [name for name in names if not hasattr(owner, name)]
    if missing:
        where = owner.__name__ if isinstance(owner, type) else type(owner).__name__
        raise RuntimeError(
            f"uvicorn {uvicorn.__version__} has no {where}.{missing[0]}, "
            "which serve.deployment.proxy.uvicorn_patches needs."
        )


async def _listen(server: uvicorn.Server, path: Path) -> asyncio.base_events.Server:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    config = server.config
    protocol_class: Any = config.http_protocol_class
    protocol = partial(protocol_class, config=config, server_state=server.server_state, app_state=server.lifespan.state)
    return await asyncio.get_running_loop().create_unix_server(protocol, str(path), backlog=config.backlog)


def with_write_coalescing(protocol_class: ProtocolClass) -> ProtocolClass:
    """Protocols that write at the end of a turn of the running event loop."""
    return partial(_coalescing_protocol, protocol_class, _LoopTurn(asyncio.get_running_loop()))


def _coalescing_protocol(protocol_class: ProtocolClass, turn: _LoopTurn, **arguments: Any) -> asyncio.Protocol:
    protocol = protocol_class(**arguments)

    def connection_made(transport: Any) -> None:
        del protocol.connection_made  # the method of the class again: no cycle is left to the garbage collector
        protocol.connection_made(CoalescingTransport(transport, turn))  # type: ignore[arg-type]

    protocol.connection_made = connection_made  # type: ignore[method-assign]
    return protocol


class _LoopTurn:
    """The transports that hold something in this turn of the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._holding: list[CoalescingTransport] = []

    def add(self, transport: CoalescingTransport) -> None:
        if not self._holding:
            self._loop.call_soon(self._end)
        self._holding.append(transport)

    def _end(self) -> None:
        holding, self._holding = self._holding, []
        for transport in holding:
            transport.flush()


class CoalescingTransport:
    """An asyncio.Transport whose `write` waits for the end of the turn."""

    def __init__(self, transport: asyncio.Transport, turn: _LoopTurn) -> None:
        self._transport = transport
        self._turn = turn
        self._held: list[bytes] = []
        self._held_bytes = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if not self._held:
            self._turn.add(self)
        self._held.append(data)
        self._held_bytes += len(data)
        if self._held_bytes > _MAX_HELD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what is held as one chunk; nothing if the client has disconnected meanwhile."""
        held, self._held, self._held_bytes = self._held, [], 0
        if held and not self._transport.is_closing():
            self._transport.write(held[0] if len(held) == 1 else b"".join(held))

    def close(self) -> None:
        self.flush()
        self._transport.close()
