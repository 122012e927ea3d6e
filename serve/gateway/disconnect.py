"""The caller's side of a request whose body was already read, as the engine's application sees it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager

from starlette.types import Message, Receive, Scope, Send

_DISCONNECT: Message = {"type": "http.disconnect"}
# Ray Serve cancels the task of a request whose caller leaves, for which it runs two tasks of its own beside each
# request, unless this header forbids it: the proxy sets it, and the leaving is for us to see.
_OURS = (b"x-request-disconnect-disabled", b"?1")
# Nobody leaves within less, and most requests are with the engine by then.
_WATCH_AFTER_S = 0.05


class Client:
    """Hands the body over once, and tells when the caller has left."""

    def __init__(self, receive: Receive, body: bytes | None = None) -> None:
        self.body = body
        self.has_left = False  # before it was answered
        self._receive = receive
        self._is_answered = False
        self._listener: asyncio.Task[object] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._watcher: asyncio.Task[None] | None = None

    @contextmanager
    def watched(self, scope: Scope) -> Iterator[None]:
        """Cancels the current task if the caller leaves before the engine listens; for a request that Ray Serve
        doesn't do that for."""
        if _OURS in scope["headers"]:
            task = asyncio.current_task()
            assert task is not None
            self._timer = asyncio.get_running_loop().call_later(_WATCH_AFTER_S, self._watch, task)
        try:
            yield
        finally:
            self._stop_watching()

    def left(self) -> None:
        """Whoever listens is told so."""
        self.has_left = True
        if self._listener:
            self._listener.cancel()

    def telling(self, send: Send) -> Send:
        """`send` that knows when the caller has all of its answer: that it leaves then says nothing."""

        def told(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.body" and not message.get("more_body"):
                self._is_answered = True
            return send(message)

        return told

    async def receive(self) -> Message:
        self._stop_watching()
        if self.body is not None:
            body, self.body = self.body, None
            return {"type": "http.request", "body": body, "more_body": False}
        if self.has_left:
            return _DISCONNECT
        listener = self._listener = asyncio.current_task()
        assert listener is not None
        try:
            message = await self._receive()
        except asyncio.CancelledError:
            if not self.has_left:
                raise
            listener.uncancel()  # it was `left`
            return _DISCONNECT
        finally:
            self._listener = None
        if message["type"] == "http.disconnect":
            self.has_left = not self._is_answered
        return message

    def _watch(self, task: asyncio.Task[object]) -> None:
        self._watcher = asyncio.create_task(self._cancel_when_left(task))

    async def _cancel_when_left(self, task: asyncio.Task[object]) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass  # uvicorn may tell the end of the body once more
        if not self._is_answered:
            self.has_left = True
            task.cancel()

    def _stop_watching(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None
        if self._watcher:
            self._watcher.cancel()
            self._watcher = None


def with_content_length(scope: Scope, length: int) -> Scope:
    headers = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
    return {**scope, "headers": [*headers, (b"content-length", str(length).encode())]}
