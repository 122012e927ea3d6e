"""A bound in front of the engine: so many requests in it, a fair queue before it, and a quick no beyond that.

An engine takes whatever it is given and answers all of it ever more slowly; its own queue knows no callers. Here they
take turns: round robin between callers, and between the models of one caller; first in, first out within those.

Nothing here knows an engine; time is the event loop's.
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
class PlaceLimits:
    """How many requests may wait for a place, how many of one caller, and for how long."""

    max_waiting: int = 128
    max_waiting_per_caller: int = 64
    max_wait_s: float = 30.0


@dataclass(eq=False)
class _Waiter:
    admitted: bool = False
    told: asyncio.Event = field(default_factory=asyncio.Event)


_Queue = OrderedDict[str, deque[_Waiter]]  # by model, the next to be served first


class Places:
    """Places in one engine."""

    def __init__(self, count: int, limits: PlaceLimits) -> None:
        self._count = count
        self._limits = limits
        self._taken = 0
        self._queues: OrderedDict[str, _Queue] = OrderedDict()  # by caller, the next to be served first
        self._waiting: Counter[str] = Counter()
        self._lasting_s = 1.0  # how long a request holds its place, smoothed

    @property
    def taken(self) -> int:
        return self._taken

    @property
    def waiting(self) -> int:
        return self._waiting.total()

    @property
    def waiting_requests(self) -> Counter[str]:
        """By model."""
        queues = (it for models in self._queues.values() for it in models.items())
        counts: Counter[str] = Counter()
        for model, waiters in queues:
            counts[model] += len(waiters)
        return counts

    @asynccontextmanager
    async def place(self, caller: str, model: str) -> AsyncIterator[Callable[[], None]]:
        """One place in the engine, and how to leave it before the context ends. Raises CallerQueueFull or
        EngineQueueFull at once if the queue has no room, and EngineWaitTooLong. A caller that leaves (cancellation)
        leaves the queue."""
        await self._enter(caller, model)
        began_s = asyncio.get_running_loop().time()
        is_left = False

        def leave() -> None:
            nonlocal is_left
            if not is_left:
                is_left = True
                self._lasting_s += 0.1 * (asyncio.get_running_loop().time() - began_s - self._lasting_s)
                self._leave()

        try:
            yield leave
        finally:
            leave()

    async def _enter(self, caller: str, model: str) -> None:
        if self._taken < self._count:  # then nobody waits
            self._taken += 1
            return
        self._check_room(caller)
        waiter = _Waiter()
        self._queues.setdefault(caller, OrderedDict()).setdefault(model, deque()).append(waiter)
        self._waiting[caller] += 1
        try:
            async with asyncio.timeout(self._limits.max_wait_s):
                await waiter.told.wait()
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
        """When all that waits now will have had a place, if requests go on taking as long as they did."""
        rounds = self.waiting / self._count
        return max(1, min(60, math.ceil(rounds * self._lasting_s)))

    def _give_up(self, caller: str, model: str, waiter: _Waiter) -> None:
        if waiter.admitted:  # let in and gone at the same moment
            self._leave()
            return
        queue = self._queues[caller]
        queue[model].remove(waiter)
        self._forget_if_empty(caller, model)
        self._uncount(caller)

    def _leave(self) -> None:
        """The place goes to the next in turn, or is free."""
        if not self._queues:
            self._taken -= 1
            return
        caller = next(iter(self._queues))
        queue = self._queues[caller]
        model = next(iter(queue))
        waiter = queue[model].popleft()
        # Whoever was served goes to the end of the line.
        queue.move_to_end(model)
        self._queues.move_to_end(caller)
        self._forget_if_empty(caller, model)
        self._uncount(caller)
        waiter.admitted = True
        waiter.told.set()

    def _forget_if_empty(self, caller: str, model: str) -> None:
        queue = self._queues[caller]
        if not queue[model]:
            del queue[model]
        if not queue:
            del self._queues[caller]

    def _uncount(self, caller: str) -> None:
        self._waiting[caller] -= 1
        if not self._waiting[caller]:
            del self._waiting[caller]
