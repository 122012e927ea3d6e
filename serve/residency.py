"""Adapters resident in one engine: loaded once, pinned while in use, least recently used evicted first."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

from serve.engine import Engine
from serve.errors import AdaptersExhausted, ServeError
from serve.names import AdapterRevision
from serve.store import AdapterStore

logger = logging.getLogger(__name__)


class AdapterPool:
    """Decides what the engine holds, so that the engine never evicts anything by itself."""

    def __init__(self, engine: Engine, store: AdapterStore, capacity: int) -> None:
        self._engine = engine
        self._store = store
        self._capacity = capacity
        self._uses: OrderedDict[AdapterRevision, int] = OrderedDict()
        self._retired: set[AdapterRevision] = set()
        self._kept: frozenset[AdapterRevision] = frozenset()
        self._changing = asyncio.Lock()
        self._unloads: set[asyncio.Task[None]] = set()

    @property
    def resident(self) -> frozenset[AdapterRevision]:
        return frozenset(self._uses)

    @property
    def free(self) -> int:
        return max(0, self._capacity - len(self._uses))

    @asynccontextmanager
    async def use(self, adapter: AdapterRevision) -> AsyncIterator[None]:
        """Hold it in the engine for the time of one request; loads it if it must.
        Raises AdaptersExhausted or AdapterUnavailable."""
        await self._pin(adapter)
        try:
            yield
        finally:
            self._unpin(adapter)

    async def load(self, adapter: AdapterRevision) -> None:
        """Make it resident ahead of its first request. Raises as `use` does."""
        async with self.use(adapter):
            self._retired.discard(adapter)

    def keep(self, adapters: frozenset[AdapterRevision]) -> None:
        """Never evict these, used or not."""
        self._kept = adapters

    async def audit(self) -> list[str]:
        """Compare with what the engine says it holds, and mend what differs: what it lost is loaded again, what it
        should not have is unloaded. Tells what was found."""
        async with self._changing:
            lost = sorted(self.resident - await self._engine.resident_adapters())
            found = [f"the engine had lost {adapter}" for adapter in lost]
            for adapter in lost:
                await self._reload(adapter)
            strangers = await self._engine.unload_strangers()
            return [*found, *([f"the engine held {strangers} adapters that nobody asked for"] if strangers else [])]

    async def retire(self, adapters: Iterable[AdapterRevision]) -> None:
        """Unload what nobody uses now, and the rest when its last request ends."""
        for adapter in adapters:
            self._retired.add(adapter)
            await self._unload_if_idle(adapter)

    async def _pin(self, adapter: AdapterRevision) -> None:
        if self._pin_resident(adapter):
            return
        # The files come first: while they are on their way from far, others are loaded.
        path = await asyncio.to_thread(self._store.path, adapter)
        async with self._changing:
            if self._pin_resident(adapter):
                return
            await self._make_room()
            await self._engine.load_adapter(adapter, path)
            self._uses[adapter] = 1

    def _pin_resident(self, adapter: AdapterRevision) -> bool:
        if adapter not in self._uses:
            return False
        self._uses[adapter] += 1
        self._uses.move_to_end(adapter)
        return True

    async def _reload(self, adapter: AdapterRevision) -> None:
        try:
            await self._engine.load_adapter(adapter, await asyncio.to_thread(self._store.path, adapter))
        except ServeError:
            # Not resident any more: the next request for it tries again and tells its caller why it can't be.
            logger.exception("could not load %s again", adapter)
            del self._uses[adapter]

    def _unpin(self, adapter: AdapterRevision) -> None:
        if adapter not in self._uses:
            return  # the engine lost it and could not load it again
        self._uses[adapter] -= 1
        if adapter in self._retired and not self._uses[adapter]:
            # A task: the request that ends here may be a cancelled one, which must not await.
            task = asyncio.create_task(self._unload_if_idle(adapter))
            self._unloads.add(task)
            task.add_done_callback(self._unloads.discard)

    async def _unload_if_idle(self, adapter: AdapterRevision) -> None:
        async with self._changing:
            if self._uses.get(adapter) == 0:
                await self._forget(adapter)

    async def _make_room(self) -> None:
        while len(self._uses) >= self._capacity:
            idle = next((it for it, uses in self._uses.items() if not uses and it not in self._kept), None)
            if idle is None:
                raise AdaptersExhausted(self._capacity)
            await self._forget(idle)

    async def _forget(self, adapter: AdapterRevision) -> None:
        # Forgotten before the await: a request arriving meanwhile must not pin an adapter that is leaving.
        del self._uses[adapter]
        self._retired.discard(adapter)
        await self._engine.unload_adapter(adapter)
