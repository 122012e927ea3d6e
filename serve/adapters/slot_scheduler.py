"""Which adapters may run: adapters take turns in the engine's slots, and their requests wait in fair queues.

The engine mixes a limited number of adapters in one batch. By itself it would let the next adapter wait as long as
requests for the running adapters arrive without a pause, because these requests overtake the waiting ones. So the
scheduler admits no more adapters than there are slots:

- Requests of one adapter run first in, first out. Adapters take turns by their oldest request.
- When a slot changes hands, all requests that wait for its new adapter start at once, and new ones for `turn_s`.
- An adapter whose turn is over gets no new request while another adapter waits: its slot is being cleared, and is
  free when its last running request ends. The longer a request waits, the more slots are cleared for it.
- An idle slot is kept for as long as loading its adapter took, because the caller may come back. Giving it away
  afterwards costs at most twice what the best choice in hindsight would have cost.

The module knows no engine; time is the event loop's.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from serve.errors import AdapterQueueFull, AdapterWaitTooLong, CallerQueueFull
from serve.names import AdapterRevision


@dataclass(frozen=True)
class WaitLimits:
    """How many requests may wait for a slot in all and of one caller, how long each may wait, how long a turn is."""

    max_waiting: int = 128
    max_waiting_per_caller: int = 64
    max_wait_s: float = 60.0
    turn_s: float = 1.0


@dataclass
class _Slot:
    since_s: float  # the beginning of its adapter's turn
    running: int = 0
    idle_since_s: float = 0.0


@dataclass(eq=False)
class _Waiter:
    caller: str
    since_s: float
    admitted: bool = False
    woken: asyncio.Event = field(default_factory=asyncio.Event)


class SlotScheduler:
    """The slots of one engine, and a queue for each adapter that waits for one."""

    def __init__(
        self, slots: int, limits: WaitLimits, on_wait: Callable[[AdapterRevision], None] = lambda _: None
    ) -> None:
        """`on_wait` is called with an adapter that has to wait for a slot, so that its files are fetched meanwhile."""
        self._count = slots
        self._limits = limits
        self._on_wait = on_wait
        self._slots: OrderedDict[AdapterRevision, _Slot] = OrderedDict()  # the oldest turn first
        self._queues: OrderedDict[AdapterRevision, deque[_Waiter]] = OrderedDict()  # the oldest request first
        self._waiting_by_caller: Counter[str] = Counter()
        self._load_s: dict[AdapterRevision, float] = {}
        self._timer: asyncio.TimerHandle | None = None

    @property
    def slots(self) -> int:
        return self._count

    @property
    def holding(self) -> frozenset[AdapterRevision]:
        """The adapters that have a slot, whether a request runs on them or not."""
        return frozenset(self._slots)

    @property
    def waiting_requests(self) -> dict[AdapterRevision, int]:
        """The number of waiting requests of each adapter that has any."""
        return {adapter: len(queue) for adapter, queue in self._queues.items()}

    @property
    def waiting(self) -> int:
        """The number of requests that wait for a slot."""
        return self._waiting_by_caller.total()

    @property
    def waiting_adapters(self) -> frozenset[AdapterRevision]:
        return frozenset(self._queues)

    @property
    def running_adapters(self) -> frozenset[AdapterRevision]:
        return frozenset(adapter for adapter, slot in self._slots.items() if slot.running)

    def has_slot_for(self, adapter: AdapterRevision) -> bool:
        """Whether a request for the adapter would start at once."""
        if adapter in self._slots:
            return self._accepts_requests(adapter)
        return not self._queues and (len(self._slots) < self._count or self._next_idle() is not None)

    def record_load_time(self, adapter: AdapterRevision, load_s: float) -> None:
        """How long loading the adapter took: the loss if its slot is given away too early."""
        self._load_s[adapter] = load_s

    def forget(self, adapter: AdapterRevision) -> None:
        """Forgets the load time of an adapter that left the engine."""
        self._load_s.pop(adapter, None)

    @asynccontextmanager
    async def acquire(self, adapter: AdapterRevision, caller: str = "") -> AsyncIterator[None]:
        """Waits for a slot of the adapter and holds it for one request.

        Raises CallerQueueFull or AdapterQueueFull at once if the queue has no room for the request, and
        AdapterWaitTooLong if no slot came free in time. A caller that leaves (cancellation) leaves the queue.
        """
        await self._wait_for_slot(adapter, caller)
        try:
            yield
        finally:
            self._finish(adapter)

    async def _wait_for_slot(self, adapter: AdapterRevision, caller: str) -> None:
        waiter = _Waiter(caller, _now())
        self._queues.setdefault(adapter, deque()).append(waiter)
        self._waiting_by_caller[caller] += 1
        self._dispatch()
        if waiter.admitted:
            return
        try:
            self._check_room(caller)
            self._on_wait(adapter)
            async with asyncio.timeout(self._limits.max_wait_s):
                await waiter.woken.wait()
        except TimeoutError:
            self._cancel(adapter, waiter)
            raise AdapterWaitTooLong(self._limits.max_wait_s, self._retry_after_s()) from None
        except BaseException:
            self._cancel(adapter, waiter)
            raise

    def _check_room(self, caller: str) -> None:
        if self._waiting_by_caller[caller] > self._limits.max_waiting_per_caller:
            raise CallerQueueFull(self._limits.max_waiting_per_caller, self._retry_after_s())
        if self.waiting > self._limits.max_waiting:
            raise AdapterQueueFull(self._limits.max_waiting, self._retry_after_s())

    def _retry_after_s(self) -> int:
        """The length of one round of turns, after which every adapter that waits now had a turn."""
        return max(1, math.ceil(len(self._queues) * self._limits.turn_s / self._count))

    def _cancel(self, adapter: AdapterRevision, waiter: _Waiter) -> None:
        if waiter.admitted:  # admitted and cancelled in the same step of the event loop
            self._finish(adapter)
            return
        queue = self._queues[adapter]
        queue.remove(waiter)
        if not queue:
            del self._queues[adapter]
        self._remove_from_count(waiter)
        self._dispatch()  # the next request may have waited only for this one

    def _finish(self, adapter: AdapterRevision) -> None:
        slot = self._slots[adapter]
        slot.running -= 1
        slot.idle_since_s = _now()
        self._dispatch()

    def _dispatch(self) -> None:
        """Starts every request that may run. Called whenever a request came or ended, and by the timer."""
        self._admit_to_held_slots()
        while (waiting := self._adapters_without_slot()) and self._make_room():
            self._slots[waiting[0]] = _Slot(since_s=_now())
            self._admit_all(waiting[0])
        self._admit_to_held_slots()  # again: fewer slots have to be cleared now
        self._set_timer()

    def _admit_to_held_slots(self) -> None:
        for adapter in [adapter for adapter in self._queues if adapter in self._slots]:
            if self._accepts_requests(adapter):
                self._admit_all(adapter)

    def _adapters_without_slot(self) -> list[AdapterRevision]:
        """The adapters that wait for a slot, in the order in which they get one."""
        return [adapter for adapter in self._queues if adapter not in self._slots]

    def _accepts_requests(self, adapter: AdapterRevision) -> bool:
        """False while the slot of the adapter is being cleared for another one."""
        return adapter not in self._adapters_to_clear()

    def _adapters_to_clear(self) -> list[AdapterRevision]:
        """The adapters whose turn is over and whose slot is needed: one slot for each adapter that waits, and one more
        for each full turn that its oldest request has waited."""
        now, turn_s = _now(), self._limits.turn_s
        needed = len(self._slots) - self._count
        for adapter in self._adapters_without_slot():
            needed += 1 + int((now - self._queues[adapter][0].since_s) / turn_s)
        turn_is_over = [adapter for adapter, slot in self._slots.items() if now >= slot.since_s + turn_s]
        return turn_is_over[: max(0, needed)]

    def _make_room(self) -> bool:
        """Frees a slot if none is free. False if that can't be done now."""
        if len(self._slots) < self._count:
            return True
        if (idle := self._next_idle()) is None:
            return False
        del self._slots[idle]
        return True

    def _next_idle(self) -> AdapterRevision | None:
        """Of the adapters whose slot may be taken now, the one that was idle for longest."""
        now = _now()
        idle = [
            adapter for adapter, slot in self._slots.items() if not slot.running and self._kept_until_s(adapter) <= now
        ]
        return min(idle, key=lambda adapter: self._slots[adapter].idle_since_s, default=None)

    def _kept_until_s(self, adapter: AdapterRevision) -> float:
        """The time from which on the slot of an idle adapter may be given to another one."""
        slot = self._slots[adapter]
        turn_over_s = slot.since_s + self._limits.turn_s
        return min(turn_over_s, slot.idle_since_s + self._load_s.get(adapter, 0.0))

    def _admit_all(self, adapter: AdapterRevision) -> None:
        for waiter in self._queues.pop(adapter):
            self._slots[adapter].running += 1
            self._remove_from_count(waiter)
            waiter.admitted = True
            waiter.woken.set()

    def _remove_from_count(self, waiter: _Waiter) -> None:
        self._waiting_by_caller[waiter.caller] -= 1
        if not self._waiting_by_caller[waiter.caller]:
            del self._waiting_by_caller[waiter.caller]

    def _set_timer(self) -> None:
        """Dispatches again when the next idle slot may be taken, if an adapter waits for one."""
        if self._timer:
            self._timer.cancel()
            self._timer = None
        idle = [self._kept_until_s(adapter) for adapter, slot in self._slots.items() if not slot.running]
        if idle and self._adapters_without_slot():
            self._timer = asyncio.get_running_loop().call_at(min(idle), self._dispatch)


def _now() -> float:
    return asyncio.get_running_loop().time()
