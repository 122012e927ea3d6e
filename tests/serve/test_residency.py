from __future__ import annotations

import asyncio
import random

import pytest

from serve.errors import AdaptersExhausted, AdapterUnavailable
from serve.residency import AdapterPool
from serve.store import AdapterStore
from tests.serve.conftest import revision
from tests.serve.fakes import FakeEngine

FRENCH, PIRATE, JSON = revision("french", "1"), revision("pirate", "1"), revision("json", "1")


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_concurrent_requests_load_an_adapter_once(engine: FakeEngine, store: AdapterStore) -> None:
    engine.load_delay_s = 0.01
    pool = AdapterPool(engine, store, capacity=2)

    async def request() -> None:
        async with pool.use(FRENCH):
            assert FRENCH in engine.resident

    await asyncio.gather(*(request() for _ in range(20)))

    assert engine.loads == [FRENCH]


async def test_the_least_recently_used_idle_adapter_makes_room(engine: FakeEngine, store: AdapterStore) -> None:
    pool = AdapterPool(engine, store, capacity=2)
    for adapter in (FRENCH, PIRATE, FRENCH, JSON):
        await pool.load(adapter)

    assert engine.unloads == [PIRATE]
    assert engine.resident == {FRENCH, JSON}


async def test_a_kept_adapter_is_never_evicted_however_long_it_was_not_used(
    engine: FakeEngine, store: AdapterStore
) -> None:
    pool = AdapterPool(engine, store, capacity=2)
    pool.keep(frozenset({FRENCH}))
    for adapter in (FRENCH, PIRATE, JSON):
        await pool.load(adapter)

    assert engine.resident == {FRENCH, JSON}


async def test_an_adapter_in_use_is_never_evicted(engine: FakeEngine, store: AdapterStore) -> None:
    pool = AdapterPool(engine, store, capacity=1)

    async with pool.use(FRENCH):
        with pytest.raises(AdaptersExhausted):
            await pool.load(PIRATE)
        assert engine.resident == {FRENCH}


async def test_a_retired_adapter_leaves_when_its_last_request_ends(engine: FakeEngine, store: AdapterStore) -> None:
    pool = AdapterPool(engine, store, capacity=2)

    async with pool.use(FRENCH):
        async with pool.use(FRENCH):
            await pool.retire([FRENCH])
            assert engine.resident == {FRENCH}
        await settle()
        assert engine.resident == {FRENCH}
    await settle()

    assert engine.resident == set()


async def test_a_retired_adapter_that_is_idle_leaves_at_once(engine: FakeEngine, store: AdapterStore) -> None:
    pool = AdapterPool(engine, store, capacity=2)
    await pool.load(FRENCH)

    await pool.retire([FRENCH])

    assert engine.resident == set()


async def test_a_failed_load_is_told_and_tried_again(engine: FakeEngine, store: AdapterStore) -> None:
    pool = AdapterPool(engine, store, capacity=1)
    engine.refuses = {FRENCH}
    with pytest.raises(AdapterUnavailable):
        await pool.load(FRENCH)

    engine.refuses = set()
    await pool.load(FRENCH)

    assert engine.resident == {FRENCH}


async def test_a_cancelled_request_gives_its_place_back(engine: FakeEngine, store: AdapterStore) -> None:
    pool = AdapterPool(engine, store, capacity=1)

    async def request() -> None:
        async with pool.use(FRENCH):
            await asyncio.sleep(60)

    running = asyncio.create_task(request())
    await asyncio.sleep(0.01)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)

    await pool.load(PIRATE)
    assert engine.resident == {PIRATE}


async def test_random_traffic_never_runs_on_an_absent_adapter(engine: FakeEngine, store: AdapterStore) -> None:
    chance = random.Random(7)
    adapters = [revision(f"adapter-{number}", "w") for number in range(7)]
    pool = AdapterPool(engine, store, capacity=3)
    served = 0

    async def request() -> None:
        nonlocal served
        adapter = chance.choice(adapters)
        engine.load_delay_s = chance.random() / 500
        try:
            async with pool.use(adapter):
                for _ in range(3):
                    await asyncio.sleep(chance.random() / 500)
                    assert adapter in engine.resident
                    assert len(engine.resident) <= 3
                served += 1
        except AdaptersExhausted:
            pass
        if chance.random() < 0.2:
            await pool.retire([chance.choice(adapters)])

    for _ in range(20):
        await asyncio.gather(*(request() for _ in range(10)))

    assert served > 20
