"""Requests that wait for a sleeping pool: the first one starts its engines, and all wait for a bounded time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Protocol

from serve.errors import PoolAsleep, ServeError


class Waker(Protocol):
    async def wake(self, name: str) -> datetime:
        """Records that a pool is woken, and returns when it was. Raises PoolAsleep with the reason if it can't be."""
        ...

    async def give_up(self, name: str) -> None:
        """Lets a pool sleep again whose engines can't start, so that the next request tries it again."""
        ...


class WakeQueue:
    """Those of one replica, for all pools together."""

    def __init__(self, waker: Waker, max_waiting: int, max_wait_s: float) -> None:
        self._waker = waker
        self._max_waiting = max_waiting
        self._max_wait_s = max_wait_s
        self._waiting = 0
        self._waking: dict[str, asyncio.Task[datetime]] = {}

    async def wake(self, name: str) -> datetime:
        """When the pool was woken. Requests that come together wake it once. Raises PoolAsleep."""
        if name not in self._waking:
            task = self._waking[name] = asyncio.create_task(self._waker.wake(name))
            task.add_done_callback(lambda _: self._waking.pop(name))
        return await asyncio.shield(self._waking[name])

    async def give_up(self, name: str) -> None:
        """Called when no engine of an awake pool could be found."""
        with contextlib.suppress(ServeError, OSError):
            await self._waker.give_up(name)

    def left_s(self, woken_at: datetime) -> float:
        """How long a request may wait for a pool that was woken then. All wait until the same time: the proxy repeats a
        request that got a 503, which must not wait again."""
        return self._max_wait_s - (datetime.now(UTC) - woken_at).total_seconds()

    @contextmanager
    def place(self, name: str) -> Iterator[None]:
        """A place in the queue, until the block ends. Raises PoolAsleep if all are taken."""
        if self._waiting >= self._max_waiting:
            raise PoolAsleep(name, f"{self._waiting} requests wait for models to start already")
        self._waiting += 1
        try:
            yield
        finally:
            self._waiting -= 1

    def too_late(self, name: str) -> PoolAsleep:
        return PoolAsleep(name, f"no engine has taken the request {self._max_wait_s:g} s after it was woken")
