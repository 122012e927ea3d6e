"""The HTTP server of a replica, which Ray Serve starts when the replica is ready.

It listens on a port. A Unix socket is less work, for it and for the proxy of the same machine: every piece of an answer
passes between the two, those of a moment together. `serve/haproxy.sh` looks for the socket by the replica's id.
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

from serve.cork import corked

# The directory of the sockets; without it there are none. Whoever may reach it may ask without passing the proxy.
_SOCKETS = "GRAFT_SOCKETS"


def on_listening(replica: str, told: Callable[[int], None]) -> None:
    """Have the next server of this process tell its port, cork its answers, and listen on a socket as well: one server,
    with one set of connections to finish when it ends."""
    usual = uvicorn.Server.startup

    async def startup(server: uvicorn.Server, sockets: list[socket.socket] | None = None) -> None:
        uvicorn.Server.startup = usual  # type: ignore[method-assign]
        server.config.http_protocol_class = corked(server.config.http_protocol_class)  # type: ignore[assignment]
        await usual(server, sockets)
        told(server.config.port)
        if directory := os.environ.get(_SOCKETS):
            server.servers.append(await _listen(server, Path(directory) / f"{replica}.sock"))

    uvicorn.Server.startup = startup  # type: ignore[assignment,method-assign]


async def _listen(server: uvicorn.Server, path: Path) -> asyncio.base_events.Server:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    config = server.config
    protocol_class: Any = config.http_protocol_class
    protocol = partial(protocol_class, config=config, server_state=server.server_state, app_state=server.lifespan.state)
    return await asyncio.get_running_loop().create_unix_server(protocol, str(path), backlog=config.backlog)
