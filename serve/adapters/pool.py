"""The adapters resident in one engine: loaded once, never evicted while in use, least recently used evicted first.

There are three tiers. The store holds every registered adapter. The engine's host memory holds at most `capacity` of
them, and the store their files: the pool decides which, so that the engine never evicts one by itself. The engine's
slots hold the adapters that `serve.adapters.slot_scheduler.SlotScheduler` lets run.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from itertools import islice

from serve.adapters.slot_scheduler import SlotScheduler, WaitLimits
from serve.catalogue.adapter_store import AdapterStore
from serve.catalogue.storage.file_threads import Purpose, to_file_thread
from serve.engine.protocol import Engine
from serve.errors import AdaptersExhausted, AdapterUnavailable, ServeError
from serve.names import AdapterRevision
from serve.observability.events import NO_EVENTS, Events, Level, UnloadReason

logger = logging.getLogger(__name__)


class AdapterPool:
    """Loads adapters into one engine, holds them for requests, and unloads them."""

    def __init__(
        self,
        engine: Engine,
        store: AdapterStore,
        capacity: int,
        slots: int | None = None,
        limits: WaitLimits | None = None,
        events: Events = NO_EVENTS,
    ) -> None:
        """`slots` adapters may run at a time: `capacity` by default, and at most. With one fewer a publish finds room
        for its new revision under any load."""
        self._engine = engine
        self._store = store
        self._capacity = capacity
        self._events = events
        self._resident: OrderedDict[AdapterRevision, None] = OrderedDict()  # least recently used first
        self._uses: Counter[AdapterRevision] = Counter()  # requests that run on it or wait for its load
        self._retired: set[AdapterRevision] = set()  # to be unloaded when their last use ends
        self._kept: frozenset[AdapterRevision] = frozenset()
        self._engine_lock = asyncio.Lock()  # one load or unload at a time
        self._loads: dict[AdapterRevision, asyncio.Task[None]] = {}
        self._prefetches: dict[AdapterRevision, asyncio.Task[None]] = {}
        self._fetching: set[AdapterRevision] = set()
        self._unloads: set[asyncio.Task[None]] = set()
        self._reserved = asyncio.Lock()  # the engine's slot that requests of callers never get
        self._unavailable: dict[AdapterRevision, AdapterUnavailable] = {}
        self.slots = SlotScheduler(slots or capacity, limits or WaitLimits(), on_wait=self._prefetch)

    @property
    def resident(self) -> frozenset[AdapterRevision]:
        return frozenset(self._resident)

    @property
    def capacity(self) -> int:
        return self._capacity

    @property
    def kept(self) -> frozenset[AdapterRevision]:
        """The adapters that are never evicted."""
        return self._kept

    @property
    def free(self) -> int:
        """How many more adapters the engine takes before one has to be evicted."""
        return max(0, self._capacity - len(self._resident))

    @property
    def unavailable(self) -> Mapping[AdapterRevision, AdapterUnavailable]:
        """The adapters whose last load failed because their files or the engine do not allow it, with the reason."""
        return self._unavailable

    def forget_unavailable_except(self, known: Callable[[AdapterRevision], bool]) -> None:
        self._unavailable = {adapter: error for adapter, error in self._unavailable.items() if known(adapter)}

    def is_fetching(self, adapter: AdapterRevision) -> bool:
        """Whether the adapter store is still reading or downloading the files of an adapter that is to be loaded."""
        return adapter in self._fetching

    def level_of(self, adapter: AdapterRevision) -> Level:
        """Where a request would find the adapter now."""
        if adapter not in self._resident:
            return "disk"
        return "gpu" if adapter in self.slots.holding else "cpu"

    def most_recently_used(self, count: int, without: frozenset[AdapterRevision]) -> list[AdapterRevision]:
        """At most `count` resident adapters that are not in `without`, the most recently used one first."""
        return list(islice((adapter for adapter in reversed(self._resident) if adapter not in without), count))

    def can_run_at_once(self, adapter: AdapterRevision) -> bool:
        """Whether a request for the adapter would neither wait for a slot nor evict another adapter."""
        return self.slots.has_slot_for(adapter) and (adapter in self._resident or self.free > 0)

    @asynccontextmanager
    async def use(self, adapter: AdapterRevision, caller: str = "") -> AsyncIterator[None]:
        """Holds the adapter in a slot of the engine for one request of `caller`: waits for a slot, then for a load if
        the adapter is not resident. Raises what `SlotScheduler.acquire` raises, or AdapterUnavailable."""
        async with self.slots.acquire(adapter, caller), self._held(adapter):
            yield

    @asynccontextmanager
    async def use_reserved(self, adapter: AdapterRevision) -> AsyncIterator[None]:
        """Holds the adapter for a check of a new revision, in the slot that the engine has beside those for requests:
        it waits for other checks, and not for running requests. Raises AdaptersExhausted or AdapterUnavailable."""
        async with self._reserved, self._held(adapter, "admin"):
            yield

    async def load(self, adapter: AdapterRevision) -> None:
        """Makes the adapter resident before its first request; needs no slot. Raises AdaptersExhausted or
        AdapterUnavailable."""
        async with self._held(adapter, "admin"):
            self._retired.discard(adapter)

    def keep(self, adapters: frozenset[AdapterRevision]) -> None:
        """Never evict these from now on, whether they are used or not. `retire` still unloads them."""
        self._kept = adapters

    async def repair_drift(self) -> list[str]:
        """Compares the pool with what the engine holds: loads again what the engine lost, and unloads what it should
        not hold. Returns a description of each difference."""
        async with self._engine_lock:
            return [*await self._reload_lost(), *await self._unload_unknown()]

    async def retire(self, adapters: Iterable[AdapterRevision]) -> None:
        """Unloads adapters that nobody uses now, and each other one when its last request ends."""
        for adapter in adapters:
            self._retired.add(adapter)
            await self._unload_if_idle(adapter)

    @asynccontextmanager
    async def _held(self, adapter: AdapterRevision, purpose: Purpose = "request") -> AsyncIterator[None]:
        """Loads the adapter if it is not resident, and prevents that it is unloaded meanwhile."""
        self._uses[adapter] += 1
        try:
            while adapter not in self._resident:
                # Shielded: other requests wait for the same load, and the engine would not stop halfway anyway.
                await asyncio.shield(self._load_once(adapter, purpose))
            self._resident.move_to_end(adapter)
            yield
        finally:
            self._release(adapter)

    def _release(self, adapter: AdapterRevision) -> None:
        self._uses[adapter] -= 1
        if self._uses[adapter]:
            return
        del self._uses[adapter]
        if adapter in self._retired:
            # In a task, because a request that was cancelled must not await.
            task = asyncio.create_task(self._unload_if_idle(adapter))
            self._unloads.add(task)
            task.add_done_callback(self._unloads.discard)

    def _load_once(self, adapter: AdapterRevision, purpose: Purpose) -> asyncio.Task[None]:
        """The running load of the adapter, or a new one."""
        if adapter not in self._loads:
            task = asyncio.create_task(self._load(adapter, purpose))
            self._loads[adapter] = task
            task.add_done_callback(lambda done: self._load_ended(adapter, done))
        return self._loads[adapter]

    def _load_ended(self, adapter: AdapterRevision, task: asyncio.Task[None]) -> None:
        del self._loads[adapter]
        if not task.cancelled():
            task.exception()  # marks it as retrieved: every request that waited for the load may have left

    async def _load(self, adapter: AdapterRevision, purpose: Purpose) -> None:
        try:
            await self._fetch_and_load(adapter, purpose)
        except Exception as error:
            if isinstance(error, AdapterUnavailable):
                self._unavailable[adapter] = error
            self._events.load_failed(adapter, error)
            raise
        self._unavailable.pop(adapter, None)

    async def _fetch_and_load(self, adapter: AdapterRevision, purpose: Purpose) -> None:
        # The files are fetched without the lock: other adapters are loaded while a slow store sends them.
        now = asyncio.get_running_loop().time  # the clock of the scheduler, which the time of a load is compared with
        fetch_began = now()
        self._fetching.add(adapter)
        try:
            path = await to_file_thread(purpose, self._store.hold, adapter)
        finally:
            self._fetching.discard(adapter)
        fetched = now()
        try:
            async with self._engine_lock:
                await self._make_room()
                began = now()
                await self._engine.load_adapter(adapter, path)
                load_s = now() - began
                self._resident[adapter] = None
                self.slots.record_load_time(adapter, load_s)
                self._events.loaded(adapter, fetched - fetch_began, load_s)
        except BaseException:
            self._store.release(adapter)
            raise

    async def _reload_lost(self) -> list[str]:
        lost = sorted(self.resident - await self._engine.resident_adapters())
        differences = [f"the engine had lost {adapter}" for adapter in lost]
        for adapter, difference in zip(lost, differences, strict=True):
            self._events.drift_repaired("lost", 1, difference)
            await self._reload(adapter)
        return differences

    async def _reload(self, adapter: AdapterRevision) -> None:
        try:
            await self._engine.load_adapter(adapter, await to_file_thread("admin", self._store.path, adapter))
        except ServeError:
            # No longer resident: the next request for the adapter tries again and gets the reason if that fails.
            logger.exception("could not load %s again", adapter)
            self._remove(adapter, "lost")
            self._store.release(adapter)

    async def _unload_unknown(self) -> list[str]:
        unloaded = await self._engine.unload_unknown()
        if not unloaded:
            return []
        self._events.drift_repaired("stranger", unloaded, "")
        return [f"the engine held {unloaded} adapters that nobody asked for"]

    async def _unload_if_idle(self, adapter: AdapterRevision) -> None:
        async with self._engine_lock:
            if adapter in self._resident and not self._uses[adapter]:
                await self._unload(adapter, "retired")

    async def _make_room(self) -> None:
        while len(self._resident) >= self._capacity:
            evictable = self._evictable()
            if not evictable:
                raise AdaptersExhausted(self._capacity)
            # An adapter that requests wait for is evicted last, because it would be loaded again at once.
            awaited = self.slots.waiting_adapters
            not_awaited = (adapter for adapter in evictable if adapter not in awaited)
            await self._unload(next(not_awaited, evictable[0]), "evicted")

    async def _unload(self, adapter: AdapterRevision, reason: UnloadReason) -> None:
        # Removed before the await: a request that arrives meanwhile must not use an adapter that is being unloaded.
        self._remove(adapter, reason)
        try:
            await self._engine.unload_adapter(adapter)
        finally:
            self._store.release(adapter)

    def _remove(self, adapter: AdapterRevision, reason: UnloadReason) -> None:
        self._events.unloaded(adapter, reason)
        del self._resident[adapter]
        self._retired.discard(adapter)
        self.slots.forget(adapter)

    def _prefetch(self, adapter: AdapterRevision) -> None:
        """Brings an adapter into memory while its requests wait for a slot."""
        if adapter not in self._resident and adapter not in self._loads and adapter not in self._prefetches:
            self._prefetches[adapter] = asyncio.create_task(self._run_prefetch(adapter))

    async def _run_prefetch(self, adapter: AdapterRevision) -> None:
        """Reads the files into the page cache; also loads the adapter into the engine's host memory if that evicts no
        adapter that requests wait for."""
        try:
            # If the adapter can't be loaded, its first request gets the reason.
            with contextlib.suppress(OSError, ServeError):
                await to_file_thread("prefetch", _read_ahead, self._store, adapter)
                if not self._loads and self._has_spare_room():
                    async with self._held(adapter):
                        pass
        finally:
            del self._prefetches[adapter]

    def _has_spare_room(self) -> bool:
        awaited = self.slots.waiting_adapters
        return self.free > 0 or any(adapter not in awaited for adapter in self._evictable())

    def _evictable(self) -> list[AdapterRevision]:
        """The least recently used one first."""
        return [adapter for adapter in self._resident if not self._uses[adapter] and adapter not in self._kept]


def _read_ahead(store: AdapterStore, adapter: AdapterRevision) -> None:
    """Asks the kernel to read the files of an adapter into its page cache; returns without waiting for that."""
    with store.held(adapter) as directory:
        for path in directory.iterdir():
            if path.is_file():
                descriptor = os.open(path, os.O_RDONLY)
                try:
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
                finally:
                    os.close(descriptor)
