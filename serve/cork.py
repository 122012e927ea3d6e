"""Pieces of answers that leave together.

A step of the engine makes a token for each of its requests, and each is a piece of another answer. Written one by one
they wake the proxy as often, and where no processor is free it takes the replica's each time. Held until the event loop
has gone round once, those of a step are written in a row, and the last pieces of an answer as one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

# More is written at once: that is how whoever makes an answer learns that its reader is slow.
_MOST_HELD_BYTES = 64 << 10

# Of uvicorn's, with its keyword arguments.
ProtocolClass = Callable[..., asyncio.Protocol]


def corked(protocol_class: ProtocolClass) -> ProtocolClass:
    """Such protocols, whose answers leave at the end of a turn of the running loop."""
    return partial(_make, protocol_class, _Turn(asyncio.get_running_loop()))


def _make(protocol_class: ProtocolClass, turn: _Turn, **arguments: Any) -> asyncio.Protocol:
    protocol = protocol_class(**arguments)

    def connection_made(transport: Any) -> None:
        del protocol.connection_made  # the class's again: no connection waits for the garbage collector
        protocol.connection_made(CorkedTransport(transport, turn))  # type: ignore[arg-type]

    protocol.connection_made = connection_made  # type: ignore[method-assign]
    return protocol


class _Turn:
    """Which transports hold something in this turn of the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._holding: list[CorkedTransport] = []

    def holds(self, transport: CorkedTransport) -> None:
        if not self._holding:
            self._loop.call_soon(self._end)
        self._holding.append(transport)

    def _end(self) -> None:
        holding, self._holding = self._holding, []
        for transport in holding:
            transport.flush()


class CorkedTransport:
    """An asyncio.Transport whose `write` waits for the end of the turn."""

    def __init__(self, transport: asyncio.Transport, turn: _Turn) -> None:
        self._transport = transport
        self._turn = turn
        self._held: list[bytes] = []
        self._held_bytes = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if not self._held:
            self._turn.holds(self)
        self._held.append(data)
        self._held_bytes += len(data)
        if self._held_bytes > _MOST_HELD_BYTES:
            self.flush()

    def flush(self) -> None:
        """What is held, as one piece; nothing to a caller that has left since."""
        held, self._held, self._held_bytes = self._held, [], 0
        if held and not self._transport.is_closing():
            self._transport.write(held[0] if len(held) == 1 else b"".join(held))

    def close(self) -> None:
        self.flush()
        self._transport.close()
