"""Callers that take nothing of their answer: found by one look now and then, with no cost for each token."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.types import Message, Send

_LOOKS_PER_TIMEOUT = 4

logger = logging.getLogger(__name__)


class _Answer:
    """One answer on its way out."""

    def __init__(self, send: Send, loop: asyncio.AbstractEventLoop) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.task = task
        self.blocked_since_s: float | None = None
        self._send = send
        self._loop = loop

    async def send(self, message: Message) -> None:
        # Returns at once unless more is on its way than the buffers before the caller hold.
        self.blocked_since_s = self._loop.time()
        await self._send(message)
        self.blocked_since_s = None


class Readers:
    """Cancels the task of an answer that could not be sent on for `timeout_s`: the engine stops with it, and its
    places and slots are free. Whoever holds the connection closes it then."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._answers: set[_Answer] = set()
        self._timer: asyncio.TimerHandle | None = None
        self.dropped = 0

    @property
    def watched_now(self) -> int:
        return len(self._answers)

    @contextmanager
    def watched(self, send: Send) -> Iterator[Send]:
        """A `send` that is watched inside. The current task is the one that is cancelled."""
        answer = _Answer(send, asyncio.get_running_loop())
        self._answers.add(answer)
        if self._timer is None:
            self._look_later()
        try:
            yield answer.send
        finally:
            self._answers.discard(answer)

    def _look_later(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._timeout_s / _LOOKS_PER_TIMEOUT, self._look)

    def _look(self) -> None:
        now = asyncio.get_running_loop().time()
        for answer in list(self._answers):
            since_s = answer.blocked_since_s
            if since_s is not None and now - since_s > self._timeout_s:
                answer.blocked_since_s = None  # told once
                self.dropped += 1
                logger.warning("a caller took nothing of its answer for %g s and was dropped", self._timeout_s)
                answer.task.cancel()
        self._timer = None
        if self._answers:
            self._look_later()
