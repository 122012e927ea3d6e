"""Who may run next: adapters take turns in the engine's slots, and their requests wait in fair queues.

The engine mixes only so many adapters in one batch. Left alone it keeps the next one waiting for as long as the
others are asked without a pause: their requests overtake. So no more adapters than it has slots for are let in:

- within an adapter requests go first in, first out; between adapters round robin, by their oldest request;
- a slot that is handed over takes everything that waits for its new adapter at once, and for `turn_s` what comes;
- an adapter whose turn is over takes nothing new while another one waits, and its slot is free when its last
  running request ends. The longer someone waits, the more slots are cleared like this;
- an idle slot is kept for as long as loading its adapter took, in case its caller only thinks: then giving it away
  costs at most twice what the best choice in hindsight would have cost.

Nothing here knows an engine; time is the event loop's.
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
    """How many requests may wait for a slot, how many of one caller, for how long, and how long a turn is."""

    max_waiting: int = 128
    max_waiting_per_caller: int = 64
    max_wait_s: float = 60.0
    turn_s: float = 1.0


@dataclass
class _Slot:
    since_s: float
    running: int = 0
    idle_since_s: float = 0.0


@dataclass(eq=False)
class _Waiter:
    caller: str
    since_s: float
    admitted: bool = False
    told: asyncio.Event = field(default_factory=asyncio.Event)


class Turns:
    """Slots for adapters that run, queues for those that wait."""

    def __init__(
        self, slots: int, limits: WaitLimits, waits: Callable[[AdapterRevision], None] = lambda _: None
    ) -> None:
        """`waits` is told an adapter that has to wait for a slot: the moment to fetch its files."""
        self._count = slots
        self._limits = limits
        self._waits = waits
        self._slots: OrderedDict[AdapterRevision, _Slot] = OrderedDict()  # longest in possession first
        self._queues: OrderedDict[AdapterRevision, deque[_Waiter]] = OrderedDict()  # oldest request first
        self._callers: Counter[str] = Counter()
        self._load_s: dict[AdapterRevision, float] = {}
        self._timer: asyncio.TimerHandle | None = None

    @property
    def slots(self) -> int:
        return self._count

    @property
    def holding(self) -> frozenset[AdapterRevision]:
        """Adapters that have a slot, whether a request runs on them or not."""
        return frozenset(self._slots)

    @property
    def waiting_requests(self) -> dict[AdapterRevision, int]:
        """How many wait for each adapter that is waited for."""
        return {adapter: len(queue) for adapter, queue in self._queues.items()}

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot."""
        return self._callers.total()

    @property
    def waiting_adapters(self) -> frozenset[AdapterRevision]:
        return frozenset(self._queues)

    @property
    def running_adapters(self) -> frozenset[AdapterRevision]:
        return frozenset(adapter for adapter, slot in self._slots.items() if slot.running)

    def has_slot_for(self, adapter: AdapterRevision) -> bool:
        """Whether a request for it would begin at once."""
        if adapter in self._slots:
            return self._takes_new(adapter)
        return not self._queues and (len(self._slots) < self._count or self._next_idle() is not None)

    def loaded(self, adapter: AdapterRevision, took_s: float) -> None:
        """Loading it took so long: what is lost if its slot is given away too early."""
        self._load_s[adapter] = took_s

    def forget(self, adapter: AdapterRevision) -> None:
        """It left the engine."""
        self._load_s.pop(adapter, None)

    @asynccontextmanager
    async def turn(self, adapter: AdapterRevision, caller: str = "", *, patient: bool = False) -> AsyncIterator[None]:
        """One request of an adapter, from the moment that it may run to its end.

        Raises CallerQueueFull or AdapterQueueFull at once if the queue has no room for it, and
        AdapterWaitTooLong if no slot came free in time. A caller that leaves (cancellation) leaves the queue.
        The limits don't hold for a `patient` one: a publish has its own, and must not fail because users wait.
        """
        await self._enter(adapter, caller, patient)
        try:
            yield
        finally:
            self._leave(adapter)

    async def _enter(self, adapter: AdapterRevision, caller: str, patient: bool) -> None:
        waiter = _Waiter(caller, _now())
        self._queues.setdefault(adapter, deque()).append(waiter)
        self._callers[caller] += 1
        self._dispatch()
        if waiter.admitted:
            return
        try:
            if not patient:
                self._check_room(caller)
            self._waits(adapter)
            async with asyncio.timeout(None if patient else self._limits.max_wait_s):
                await waiter.told.wait()
        except TimeoutError:
            self._give_up(adapter, waiter)
            raise AdapterWaitTooLong(self._limits.max_wait_s, self._retry_after_s()) from None
        except BaseException:
            self._give_up(adapter, waiter)
            raise

    def _check_room(self, caller: str) -> None:
        if self._callers[caller] > self._limits.max_waiting_per_caller:
            raise CallerQueueFull(self._limits.max_waiting_per_caller, self._retry_after_s())
        if self.waiting > self._limits.max_waiting:
            raise AdapterQueueFull(self._limits.max_waiting, self._retry_after_s())

    def _retry_after_s(self) -> int:
        """A round of turns: when everyone who waits now had one."""
        return max(1, math.ceil(len(self._queues) * self._limits.turn_s / self._count))

    def _give_up(self, adapter: AdapterRevision, waiter: _Waiter) -> None:
        if waiter.admitted:  # let in and gone at the same moment
            self._leave(adapter)
            return
        queue = self._queues[adapter]
        queue.remove(waiter)
        if not queue:
            del self._queues[adapter]
        self._uncount(waiter)
        self._dispatch()  # who waited behind it may have its way free

    def _leave(self, adapter: AdapterRevision) -> None:
        slot = self._slots[adapter]
        slot.running -= 1
        slot.idle_since_s = _now()
        self._dispatch()

    def _dispatch(self) -> None:
        """Let in everyone who may; called whenever something changed."""
        self._admit_to_held_slots()
        while (waiting := self._without_slot()) and self._free_one():
            self._slots[waiting[0]] = _Slot(since_s=_now())
            self._admit_all(waiting[0])
        self._admit_to_held_slots()  # of those that had to be cleared for someone who has a slot now
        self._set_timer()

    def _admit_to_held_slots(self) -> None:
        for adapter in [adapter for adapter in self._queues if adapter in self._slots]:
            if self._takes_new(adapter):
                self._admit_all(adapter)

    def _without_slot(self) -> list[AdapterRevision]:
        """Adapters that wait for a slot, in the order in which they get one."""
        return [adapter for adapter in self._queues if adapter not in self._slots]

    def _takes_new(self, adapter: AdapterRevision) -> bool:
        """False while its slot is being cleared for another adapter."""
        return adapter not in self._clearing()

    def _clearing(self) -> list[AdapterRevision]:
        """The slots whose turn is over, as many as are needed: one for each adapter that waits for one, and one
        more for each turn that it has waited already."""
        now = _now()
        turn_s = self._limits.turn_s
        needed = len(self._slots) - self._count
        for adapter in self._without_slot():
            needed += 1 + int((now - self._queues[adapter][0].since_s) / turn_s)
        over = [adapter for adapter, slot in self._slots.items() if now >= slot.since_s + turn_s]
        return over[: max(0, needed)]

    def _free_one(self) -> bool:
        """Make room for one more adapter if that can be now."""
        if len(self._slots) < self._count:
            return True
        if (idle := self._next_idle()) is None:
            return False
        del self._slots[idle]
        return True

    def _next_idle(self) -> AdapterRevision | None:
        """The slot that may be taken now and was not used for longest."""
        now = _now()
        idle = [it for it, slot in self._slots.items() if not slot.running and self._kept_until_s(it) <= now]
        return min(idle, key=lambda it: self._slots[it].idle_since_s, default=None)

    def _kept_until_s(self, adapter: AdapterRevision) -> float:
        """When the slot of an idle adapter may go to another one."""
        slot = self._slots[adapter]
        turn_over_s = slot.since_s + self._limits.turn_s
        return min(turn_over_s, slot.idle_since_s + self._load_s.get(adapter, 0.0))

    def _admit_all(self, adapter: AdapterRevision) -> None:
        for waiter in self._queues.pop(adapter):
            self._slots[adapter].running += 1
            self._uncount(waiter)
            waiter.admitted = True
            waiter.told.set()

    def _uncount(self, waiter: _Waiter) -> None:
        self._callers[waiter.caller] -= 1
        if not self._callers[waiter.caller]:
            del self._callers[waiter.caller]

    def _set_timer(self) -> None:
        """Wake up when the next idle slot may be taken, if someone waits for one."""
        if self._timer:
            self._timer.cancel()
            self._timer = None
        idle = [self._kept_until_s(adapter) for adapter, slot in self._slots.items() if not slot.running]
        if idle and self._without_slot():
            self._timer = asyncio.get_running_loop().call_at(min(idle), self._dispatch)


def _now() -> float:
    return asyncio.get_running_loop().time()
