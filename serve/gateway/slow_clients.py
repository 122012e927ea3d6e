"""Drops clients that stop reading their response; a periodic check finds them, at no cost for each token."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.types import Message, Send

_CHECKS_PER_TIMEOUT = 4

logger = logging.getLogger(__name__)


class _Response:
    """One response that is being sent."""

    def __init__(self, send: Send, loop: asyncio.AbstractEventLoop) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.task = task
        self.blocked_since_s: float | None = None
        self._send = send
        self._loop = loop

    async def send(self, message: Message) -> None:
        # Returns at once, unless the buffers on the way to the client are full.
        self.blocked_since_s = self._loop.time()
        await self._send(message)
        self.blocked_since_s = None


class SlowClientGuard:
    """Cancels the task of a response whose client has read nothing for `timeout_s`. That aborts the request in the
    engine and frees its slots; the server that holds the connection then closes it."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._responses: set[_Response] = set()
        self._timer: asyncio.TimerHandle | None = None
        self.dropped = 0

    @property
    def guarded_responses(self) -> int:
        return len(self._responses)

    @contextmanager
    def guard(self, send: Send) -> Iterator[Send]:
        """A `send` for the response of the current task, which is the task that may be cancelled."""
        response = _Response(send, asyncio.get_running_loop())
        self._responses.add(response)
        if self._timer is None:
            self._schedule_check()
        try:
            yield response.send
        finally:
            self._responses.discard(response)

    def _schedule_check(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._timeout_s / _CHECKS_PER_TIMEOUT, self._check)

    def _check(self) -> None:
        now_s = asyncio.get_running_loop().time()
        for response in list(self._responses):
            since_s = response.blocked_since_s
            if since_s is not None and now_s - since_s > self._timeout_s:
                response.blocked_since_s = None  # cancelled once only
                self.dropped += 1
                logger.warning("a client read nothing of its response for %g s and was dropped", self._timeout_s)
                response.task.cancel()
        self._timer = None
        if self._responses:
            self._schedule_check()
