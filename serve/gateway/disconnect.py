"""Notices that the client of a request has disconnected, and shows it to the engine's application."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.types import Message, Receive, Scope

_DISCONNECT: Message = {"type": "http.disconnect"}
# Ray Serve's proxy sets this header. With it Ray Serve doesn't cancel the task of a request whose client disconnects,
# which would take two more tasks for each request: the gateway watches instead.
_GATEWAY_WATCHES = (b"x-request-disconnect-disabled", b"?1")
# After this time most requests have reached the engine, which itself watches for a disconnect. So most requests need no
# task that watches.
_WATCH_AFTER_S = 0.05


class DisconnectWatcher:
    """The ASGI `receive` of a request whose body was already read: hands `body` over once, then a disconnect."""

    def __init__(self, receive: Receive, body: bytes | None = None) -> None:
        self.body = body
        self.is_disconnected = False  # before the response was complete
        self._receive = receive
        self._is_complete = False
        self._receiver: asyncio.Task[object] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._watcher: asyncio.Task[None] | None = None

    @contextmanager
    def watch(self, scope: Scope) -> Iterator[None]:
        """Cancels the current task if the client disconnects before the engine receives. Does nothing for a request
        whose task Ray Serve cancels."""
        if _GATEWAY_WATCHES in scope["headers"]:
            task = asyncio.current_task()
            assert task is not None
            self._timer = asyncio.get_running_loop().call_later(_WATCH_AFTER_S, self._start_watcher, task)
        try:
            yield
        finally:
            self._stop_watching()

    def disconnect(self) -> None:
        """Makes `receive` return a disconnect, also a call of it that is waiting now."""
        self.is_disconnected = True
        if self._receiver:
            self._receiver.cancel()

    def response_complete(self) -> None:
        """Called once the response is complete. A disconnect after that is the normal end of a request."""
        self._is_complete = True

    async def receive(self) -> Message:
        self._stop_watching()
        if self.body is not None:
            body, self.body = self.body, None
            return {"type": "http.request", "body": body, "more_body": False}
        if self.is_disconnected:
            return _DISCONNECT
        receiver = self._receiver = asyncio.current_task()
        assert receiver is not None
        try:
            message = await self._receive()
        except asyncio.CancelledError:
            if not self.is_disconnected:
                raise
            receiver.uncancel()  # `disconnect` cancelled it
            return _DISCONNECT
        finally:
            self._receiver = None
        if message["type"] == "http.disconnect":
            self.is_disconnected = not self._is_complete
        return message

    def _start_watcher(self, task: asyncio.Task[object]) -> None:
        self._watcher = asyncio.create_task(self._cancel_on_disconnect(task))

    async def _cancel_on_disconnect(self, task: asyncio.Task[object]) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass  # uvicorn may repeat the end of the body
        if not self._is_complete:
            self.is_disconnected = True
            task.cancel()

    def _stop_watching(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None
        if self._watcher:
            self._watcher.cancel()
            self._watcher = None
