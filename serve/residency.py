"""Adapters resident in one engine: loaded once, pinned while in use, least recently used evicted first.

Three tiers. The store holds every adapter that is registered. The engine's host memory holds `capacity` of them:
this pool decides which, so that the engine never evicts anything by itself. In its slots run as many as
`serve.waiting.Turns` lets in at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from itertools import islice

from serve.engine import Engine
from serve.errors import AdaptersExhausted, ServeError
from serve.events import NOBODY, Events, Left, Level
from serve.names import AdapterRevision
from serve.prefetch import read_ahead
from serve.store import AdapterStore
from serve.waiting import Turns, WaitLimits

logger = logging.getLogger(__name__)


class AdapterPool:
    """What the engine holds, and who may use it."""

    def __init__(
        self,
        engine: Engine,
        store: AdapterStore,
        capacity: int,
        slots: int | None = None,
        limits: WaitLimits | None = None,
        events: Events = NOBODY,
    ) -> None:
        """`slots`: adapters that may run at a time, at most `capacity`; one below it leaves a publish its place
        under any load. Default: all of them."""
        self._engine = engine
        self._store = store
        self._capacity = capacity
        self._events = events
        self._resident: OrderedDict[AdapterRevision, None] = OrderedDict()  # least recently used first
        self._uses: Counter[AdapterRevision] = Counter()  # requests that run on it or wait for its load
        self._retired: set[AdapterRevision] = set()
        self._kept: frozenset[AdapterRevision] = frozenset()
        self._changing = asyncio.Lock()
        self._loads: dict[AdapterRevision, asyncio.Task[None]] = {}
        self._fetching: dict[AdapterRevision, asyncio.Task[None]] = {}
        self._background: set[asyncio.Task[None]] = set()
        self.turns = Turns(slots or capacity, limits or WaitLimits(), waits=self._prefetch)

    @property
    def resident(self) -> frozenset[AdapterRevision]:
        return frozenset(self._resident)

    @property
    def capacity(self) -> int:
        return self._capacity

    @property
    def kept(self) -> frozenset[AdapterRevision]:
        """What is never evicted."""
        return self._kept

    @property
    def free(self) -> int:
        return max(0, self._capacity - len(self._resident))

    def level_of(self, adapter: AdapterRevision) -> Level:
        """Where a request for it would find it now."""
        if adapter not in self._resident:
            return "disk"
        return "gpu" if adapter in self.turns.holding else "cpu"

    def latest_used(self, count: int, without: frozenset[AdapterRevision]) -> list[AdapterRevision]:
        """At most so many resident ones, latest used first."""
        return list(islice((it for it in reversed(self._resident) if it not in without), count))

    def is_at_hand(self, adapter: AdapterRevision) -> bool:
        """Whether a request for it would neither wait for a slot nor push another adapter out."""
        return self.turns.has_slot_for(adapter) and (adapter in self._resident or self.free > 0)

    @asynccontextmanager
    async def use(self, adapter: AdapterRevision, caller: str = "", *, patient: bool = False) -> AsyncIterator[None]:
        """Hold it in the engine for the time of one request of `caller`: waits for its turn, loads it if it must.
        Raises what `Turns.turn` raises, or AdapterUnavailable."""
        async with self.turns.turn(adapter, caller, patient=patient), self._pinned(adapter):
            yield

    async def load(self, adapter: AdapterRevision) -> None:
        """Make it resident ahead of its first request; needs no slot. Raises AdaptersExhausted or
        AdapterUnavailable."""
        async with self._pinned(adapter):
            self._retired.discard(adapter)

    def keep(self, adapters: frozenset[AdapterRevision]) -> None:
        """Never evict these, used or not; `retire` still unloads them."""
        self._kept = adapters

    async def audit(self) -> list[str]:
        """Compare with what the engine says it holds, and mend what differs: what it lost is loaded again, what it
        should not have is unloaded. Tells what was found."""
        async with self._changing:
            lost = sorted(self.resident - await self._engine.resident_adapters())
            found = [f"the engine had lost {adapter}" for adapter in lost]
            for adapter, what in zip(lost, found, strict=True):
                self._events.mended("lost", 1, what)
                await self._reload(adapter)
            strangers = await self._engine.unload_strangers()
            if strangers:
                self._events.mended("stranger", strangers, "")
            return [*found, *([f"the engine held {strangers} adapters that nobody asked for"] if strangers else [])]

    async def retire(self, adapters: Iterable[AdapterRevision]) -> None:
        """Unload what nobody uses now, and the rest when its last request ends."""
        for adapter in adapters:
            self._retired.add(adapter)
            await self._unload_if_idle(adapter)

    @asynccontextmanager
    async def _pinned(self, adapter: AdapterRevision) -> AsyncIterator[None]:
        self._uses[adapter] += 1
        try:
            while adapter not in self._resident:
                # Shielded: others wait for the same load, and the engine would not stop in the middle anyway.
                await asyncio.shield(self._load_once(adapter))
            self._resident.move_to_end(adapter)
            yield
        finally:
            self._unpin(adapter)

    def _unpin(self, adapter: AdapterRevision) -> None:
        self._uses[adapter] -= 1
        if self._uses[adapter]:
            return
        del self._uses[adapter]
        if adapter in self._retired:
            # A task: the request that ends here may be a cancelled one, which must not await.
            task = asyncio.create_task(self._unload_if_idle(adapter))
            self._background.add(task)
            task.add_done_callback(self._background.discard)

    def _load_once(self, adapter: AdapterRevision) -> asyncio.Task[None]:
        """The load that is under way, or a new one."""
        if adapter not in self._loads:
            task = asyncio.create_task(self._load(adapter))
            self._loads[adapter] = task
            task.add_done_callback(lambda done: self._load_ended(adapter, done))
        return self._loads[adapter]

    def _load_ended(self, adapter: AdapterRevision, task: asyncio.Task[None]) -> None:
        del self._loads[adapter]
        if not task.cancelled():
            task.exception()  # seen, even if everyone who waited for it has left

    async def _load(self, adapter: AdapterRevision) -> None:
        try:
            await self._fetch_and_load(adapter)
        except Exception as error:
            self._events.load_failed(adapter, error)
            raise

    async def _fetch_and_load(self, adapter: AdapterRevision) -> None:
        # The files come first: while they are on their way from far, others are loaded.
        asked = time.monotonic()
        path = await asyncio.to_thread(self._store.path, adapter)
        fetched = time.monotonic()
        async with self._changing:
            await self._make_room()
            began = time.monotonic()
            await self._engine.load_adapter(adapter, path)
            took_s = time.monotonic() - began
            self._resident[adapter] = None
            self.turns.loaded(adapter, took_s)
            self._events.loaded(adapter, fetched - asked, took_s)

    async def _reload(self, adapter: AdapterRevision) -> None:
        try:
            await self._engine.load_adapter(adapter, await asyncio.to_thread(self._store.path, adapter))
        except ServeError:
            # Not resident any more: the next request for it tries again and tells its caller why it can't be.
            logger.exception("could not load %s again", adapter)
            self._strike(adapter, "lost")

    async def _unload_if_idle(self, adapter: AdapterRevision) -> None:
        async with self._changing:
            if adapter in self._resident and not self._uses[adapter]:
                await self._forget(adapter, "retired")

    async def _make_room(self) -> None:
        while len(self._resident) >= self._capacity:
            idle = self._evictable()
            if not idle:
                raise AdaptersExhausted(self._capacity)
            # What requests wait for leaves last: it would be loaded again at once.
            waited_for = self.turns.waiting_adapters
            await self._forget(next((adapter for adapter in idle if adapter not in waited_for), idle[0]), "evicted")

    async def _forget(self, adapter: AdapterRevision, reason: Left) -> None:
        # Forgotten before the await: a request arriving meanwhile must not pin an adapter that is leaving.
        self._strike(adapter, reason)
        await self._engine.unload_adapter(adapter)

    def _strike(self, adapter: AdapterRevision, reason: Left) -> None:
        self._events.left(adapter, reason)
        del self._resident[adapter]
        self._retired.discard(adapter)
        self.turns.forget(adapter)

    def _prefetch(self, adapter: AdapterRevision) -> None:
        """Its requests wait for a slot: have its files in memory when they get one."""
        if adapter not in self._resident and adapter not in self._loads and adapter not in self._fetching:
            self._fetching[adapter] = asyncio.create_task(self._fetch(adapter))

    async def _fetch(self, adapter: AdapterRevision) -> None:
        """Into the page cache in any case; into the engine's host memory if nobody is put out by that."""
        try:
            # What is wrong with the adapter is told by the load of its first request.
            with contextlib.suppress(OSError, ServeError):
                await asyncio.to_thread(lambda: read_ahead(self._store.path(adapter)))
                if not self._loads and self._has_spare_place():
                    async with self._pinned(adapter):
                        pass
        finally:
            del self._fetching[adapter]

    def _has_spare_place(self) -> bool:
        waited_for = self.turns.waiting_adapters
        return self.free > 0 or any(adapter not in waited_for for adapter in self._evictable())

    def _evictable(self) -> list[AdapterRevision]:
        """Least recently used first."""
        return [it for it in self._resident if not self._uses[it] and it not in self._kept]
