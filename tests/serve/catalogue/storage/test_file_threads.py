"""Slow work on the files of adapters keeps nothing else waiting."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

from serve.adapters.pool import AdapterPool
from serve.adapters.slot_scheduler import WaitLimits
from serve.catalogue.adapter_store import AdapterStore
from serve.catalogue.storage.object_store import DirectoryStore
from serve.names import AdapterRevision
from tests.serve.conftest import revision
from tests.serve.fakes import FakeEngine

COLD = [revision(f"cold-{number}", "1") for number in range(40)]  # asyncio.to_thread has 32 threads at most
PUBLISHED = revision("published", "1")
TIMEOUT_S = 20  # of a test that hangs


class SlowStore(AdapterStore):
    """Sends the files of the cold adapters only when it is told to."""

    def __init__(self) -> None:
        super().__init__(Path("/nowhere"), DirectoryStore(Path("/nowhere")))
        self.sends = threading.Event()

    def path(self, adapter: AdapterRevision) -> Path:
        assert adapter == PUBLISHED or self.sends.wait(TIMEOUT_S)
        return Path("/nowhere")


async def test_many_cold_adapters_keep_neither_a_publish_nor_other_threads_waiting(engine: FakeEngine) -> None:
    store = SlowStore()
    pool = AdapterPool(engine, store, capacity=50, slots=20, limits=WaitLimits(max_waiting=99))

    async def request(adapter: AdapterRevision) -> None:
        async with pool.use(adapter):
            pass

    requests = [asyncio.create_task(request(adapter)) for adapter in COLD]  # half of them load, half are prefetched
    await asyncio.sleep(0.1)
    async with asyncio.timeout(TIMEOUT_S / 2):
        await asyncio.to_thread(lambda: None)
        await pool.load(PUBLISHED)
    assert engine.resident == {PUBLISHED}

    store.sends.set()
    await asyncio.gather(*requests)
    assert engine.resident == {PUBLISHED, *COLD}
