"""The queue in front of the engine: it limits the running requests, is fair to callers, and refuses at once when full.

An engine accepts every request, so that all of them become slower, and its own queue knows no callers. This queue is
round robin between callers, then between the models of one caller, and first in, first out within those.

Nothing here depends on an engine. Time is that of the event loop.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from serve.errors import CallerQueueFull, EngineQueueFull, EngineWaitTooLong


@dataclass(frozen=True)
class QueueLimits:
    """How many requests may wait for an engine slot, how many of one caller, and for how long."""

    max_waiting: int = 128
    max_waiting_per_caller: int = 64
    max_wait_s: float = 30.0


@dataclass(eq=False)
class _Waiter:
    admitted: bool = False
    was_admitted: asyncio.Event = field(default_factory=asyncio.Event)


_Queue = OrderedDict[str, deque[_Waiter]]  # by model, the next to be served first


class EngineQueue:
    """Admits at most as many requests as one engine runs, in fair turns of the callers."""

    def __init__(self, max_running: int, limits: QueueLimits) -> None:
        self._max_running = max_running
        self._limits = limits
        self._running = 0
        self._queues: OrderedDict[str, _Queue] = OrderedDict()  # by caller, the next to be served first
        self._waiting: Counter[str] = Counter()
        self._mean_run_s = 1.0  # how long a request holds its engine slot, smoothed exponentially

    @property
    def running(self) -> int:
        return self._running

    @property
    def waiting(self) -> int:
        return self._waiting.total()

    @property
    def waiting_requests(self) -> Counter[str]:
        """By model."""
        counts: Counter[str] = Counter()
        for models in self._queues.values():
            for model, waiters in models.items():
                counts[model] += len(waiters)
        return counts

    @asynccontextmanager
    async def acquire(self, caller: str, model: str) -> AsyncIterator[Callable[[], None]]:
        """Holds one engine slot; yields a function that releases it before the context ends. Raises CallerQueueFull or
        EngineQueueFull at once if the queue is full, and EngineWaitTooLong. A request that is cancelled leaves the
        queue."""
        await self._enter(caller, model)
        began_s = asyncio.get_running_loop().time()
        is_released = False

        def release() -> None:
            nonlocal is_released
            if not is_released:
                is_released = True
                self._mean_run_s += 0.1 * (asyncio.get_running_loop().time() - began_s - self._mean_run_s)
                self._release()

        try:
            yield release
        finally:
            release()

    async def _enter(self, caller: str, model: str) -> None:
        if self._running < self._max_running:  # so no request waits
            self._running += 1
            return
        self._check_room(caller)
        waiter = _Waiter()
        self._queues.setdefault(caller, OrderedDict()).setdefault(model, deque()).append(waiter)
        self._waiting[caller] += 1
        try:
            async with asyncio.timeout(self._limits.max_wait_s):
                await waiter.was_admitted.wait()
        except TimeoutError:
            self._give_up(caller, model, waiter)
            raise EngineWaitTooLong(self._limits.max_wait_s, self._retry_after_s()) from None
        except BaseException:
            self._give_up(caller, model, waiter)
            raise

    def _check_room(self, caller: str) -> None:
        if self._waiting[caller] >= self._limits.max_waiting_per_caller:
            raise CallerQueueFull(self._limits.max_waiting_per_caller, self._retry_after_s())
        if self.waiting >= self._limits.max_waiting:
            raise EngineQueueFull(self._limits.max_waiting, self._retry_after_s())

    def _retry_after_s(self) -> int:
        """Seconds until every request that waits now has started, if requests take as long as the recent ones."""
        rounds = self.waiting / self._max_running
        return max(1, min(60, math.ceil(rounds * self._mean_run_s)))

    def _give_up(self, caller: str, model: str, waiter: _Waiter) -> None:
        if waiter.admitted:  # admitted and cancelled in the same turn of the event loop
            self._release()
            return
        queue = self._queues[caller]
        queue[model].remove(waiter)
        self._remove_if_empty(caller, model)
        self._count_down(caller)

    def _release(self) -> None:
        """The slot goes to the next waiter in turn, or is free."""
        if not self._queues:
            self._running -= 1
            return
        caller = next(iter(self._queues))
        queue = self._queues[caller]
        model = next(iter(queue))
        waiter = queue[model].popleft()
        # A caller or model whose request was admitted goes to the end of the line.
        queue.move_to_end(model)
        self._queues.move_to_end(caller)
        self._remove_if_empty(caller, model)
        self._count_down(caller)
        waiter.admitted = True
        waiter.was_admitted.set()

    def _remove_if_empty(self, caller: str, model: str) -> None:
        queue = self._queues[caller]
        if not queue[model]:
            del queue[model]
        if not queue:
            del self._queues[caller]

    def _count_down(self, caller: str) -> None:
        self._waiting[caller] -= 1
        if not self._waiting[caller]:
            del self._waiting[caller]
