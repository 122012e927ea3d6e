"""What came of a request: its status, when its first byte left, and its body where someone will compare it.

Here and in the other layers that an answer passes through, `send` makes no coroutine of its own for a piece that it has
nothing to wait for: there is a piece for each token.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable

from starlette.types import Message, Send

from serve.split import Outcome

_MAX_KEPT_BYTES = 1 << 20


class Witness:
    """Passes an answer on and remembers what of it matters."""

    def __init__(self, send: Send, keeps_body: bool = False) -> None:
        self._send = send
        self._began_s = time.monotonic()
        self._first_byte_s: float | None = None
        self._status = 0
        self._kept: bytearray | None = bytearray() if keeps_body else None

    def send(self, message: Message) -> Awaitable[None]:
        if message["type"] == "http.response.start":
            self._status = message["status"]
        elif message["type"] == "http.response.body":
            if self._first_byte_s is None:
                self._first_byte_s = time.monotonic() - self._began_s
            self._keep(message.get("body", b""))
        return self._send(message)

    @property
    def body(self) -> bytes | None:
        """The body of a successful answer; None if it wasn't kept, or is too large to."""
        return bytes(self._kept) if self._kept is not None and self._status == 200 else None

    def outcome(self, failed: bool = False) -> Outcome:
        first_byte_s = self._first_byte_s if self._first_byte_s is not None else time.monotonic() - self._began_s
        return Outcome(time.monotonic(), failed or self._status >= 500, first_byte_s)

    def _keep(self, piece: bytes) -> None:
        if self._kept is not None:
            self._kept += piece
            if len(self._kept) > _MAX_KEPT_BYTES:
                self._kept = None
