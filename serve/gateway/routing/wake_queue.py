"""Requests that wait for a sleeping pool: the first one starts its engines, and all wait for a bounded time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from serve.errors import PoolAsleep

# Records that a pool is woken, and returns when it was. Raises PoolAsleep with the reason if it can't be.
Wake = Callable[[str], Awaitable[datetime]]


class WakeQueue:
    """Those of one replica, for all pools together."""

    def __init__(self, wake: Wake, max_waiting: int, max_wait_s: float) -> None:
        self._wake = wake
        self._max_waiting = max_waiting
        self._max_wait_s = max_wait_s
        self._waiting = 0
        self._waking: dict[str, asyncio.Task[datetime]] = {}

    async def wake(self, name: str) -> datetime:
        """When the pool was woken. Requests that come together wake it once. Raises PoolAsleep."""
        if name not in self._waking:
            task = self._waking[name] = asyncio.ensure_future(self._wake(name))
            task.add_done_callback(lambda _: self._waking.pop(name))
        return await asyncio.shield(self._waking[name])

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
