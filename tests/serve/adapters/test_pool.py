from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve.adapters.pool import AdapterPool
from serve.adapters.slot_scheduler import WaitLimits
from serve.catalogue.adapter_store import AdapterStore
from serve.catalogue.storage.object_store import DirectoryStore
from serve.errors import AdaptersExhausted, AdapterUnavailable
from serve.names import AdapterRevision
from tests.serve.conftest import revision
from tests.serve.fakes import FakeEngine
from tests.serve.virtual_time import run

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


async def test_an_adapter_that_is_kept_is_never_evicted_but_can_be_retired(
    engine: FakeEngine, store: AdapterStore
) -> None:
    pool = AdapterPool(engine, store, capacity=2)
    pool.keep(frozenset({FRENCH}))
    for adapter in (FRENCH, PIRATE, JSON, PIRATE):
        await pool.load(adapter)
    assert engine.resident == {FRENCH, PIRATE}

    await pool.retire([FRENCH])
    assert engine.resident == {PIRATE}


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


async def test_a_failed_load_is_reported_and_tried_again(engine: FakeEngine, store: AdapterStore) -> None:
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


@pytest.mark.virtual_time
async def test_a_caller_that_leaves_during_a_load_does_not_break_it_for_the_others(
    engine: FakeEngine, store: AdapterStore
) -> None:
    engine.load_delay_s = 0.02
    pool = AdapterPool(engine, store, capacity=1)

    async def request() -> None:
        async with pool.use(FRENCH):
            assert FRENCH in engine.resident

    leaver, stayer = asyncio.create_task(request()), asyncio.create_task(request())
    await asyncio.sleep(0.005)
    leaver.cancel()
    await stayer

    assert leaver.cancelled()
    assert engine.loads == [FRENCH]


@pytest.mark.virtual_time
async def test_a_load_that_everyone_has_left_is_known_and_can_be_evicted(
    engine: FakeEngine, store: AdapterStore
) -> None:
    engine.load_delay_s = 0.02
    pool = AdapterPool(engine, store, capacity=1)

    leaver = asyncio.create_task(pool.load(FRENCH))
    await asyncio.sleep(0.005)
    leaver.cancel()
    await pool.load(PIRATE)

    assert engine.resident == pool.resident == {PIRATE}
    assert engine.unloads == [FRENCH]


async def test_what_waits_for_a_slot_is_brought_into_host_memory_meanwhile(
    engine: FakeEngine, store: AdapterStore, tmp_path: Path
) -> None:
    (tmp_path / PIRATE.revision).mkdir()
    (tmp_path / PIRATE.revision / "adapter_model.safetensors").write_bytes(b"weights")
    pool = AdapterPool(engine, store, capacity=3, slots=1)
    async with pool.use(FRENCH):
        await pool.load(JSON)
        waits = asyncio.create_task(hold(pool, PIRATE))
        await until_resident(engine, PIRATE)
        assert not waits.done()
        assert engine.unloads == []
    await waits
    assert engine.loads == [FRENCH, JSON, PIRATE]


async def test_nobody_is_put_out_for_what_only_may_be_needed(
    engine: FakeEngine, store: AdapterStore, tmp_path: Path
) -> None:
    for adapter in (PIRATE, JSON):
        (tmp_path / adapter.revision).mkdir(exist_ok=True)
    pool = AdapterPool(engine, store, capacity=2, slots=1)
    async with pool.use(FRENCH):
        waits = [asyncio.create_task(hold(pool, PIRATE))]
        await until_resident(engine, PIRATE)
        waits.append(asyncio.create_task(hold(pool, JSON)))
        await asyncio.sleep(0.02)
        assert engine.loads == [FRENCH, PIRATE], "the last place is taken by what waits as well"
    await asyncio.gather(*waits)
    assert engine.loads == [FRENCH, PIRATE, JSON]


async def hold(pool: AdapterPool, adapter: AdapterRevision) -> None:
    async with pool.use(adapter):
        pass


async def until_resident(engine: FakeEngine, adapter: AdapterRevision) -> None:
    async with asyncio.timeout(60):
        while adapter not in engine.resident:  # noqa: ASYNC110  (the engine has no event for it)
            await asyncio.sleep(0.001)


@dataclass(frozen=True)
class Request:
    adapter: int
    at_s: float
    takes_s: float
    leaves_after_s: float | None
    retires: int | None


REQUESTS = st.lists(
    st.builds(
        Request,
        adapter=st.integers(0, 6),
        at_s=st.floats(0, 3),
        takes_s=st.floats(0.001, 1),
        leaves_after_s=st.none() | st.floats(0, 2),
        retires=st.none() | st.integers(0, 6),
    ),
    min_size=1,
    max_size=40,
)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(requests=REQUESTS, slots=st.integers(1, 3), spare=st.integers(1, 2), load_s=st.floats(0, 0.5))
def test_no_traffic_runs_on_an_absent_adapter_or_overfills_the_engine(
    tmp_path: Path, requests: list[Request], slots: int, spare: int, load_s: float
) -> None:
    """Requests that come, leave in any moment and retire adapters, in virtual time."""
    adapters = [revision(f"adapter-{number}", "w") for number in range(7)]
    served: set[int] = set()

    async def one(pool: AdapterPool, engine: FakeEngine, number: int, request: Request) -> None:
        adapter = adapters[request.adapter]
        await asyncio.sleep(request.at_s)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(request.leaves_after_s), pool.use(adapter):
                for _ in range(3):
                    assert adapter in engine.resident
                    assert len(engine.resident) <= slots + spare
                    assert len(pool.slots.running_adapters) <= slots
                    await asyncio.sleep(request.takes_s / 3)
                served.add(number)
        if request.retires is not None:
            await pool.retire([adapters[request.retires]])

    async def main() -> None:
        engine = FakeEngine()
        engine.load_delay_s = load_s
        limits = WaitLimits(max_waiting=1000, max_waiting_per_caller=1000, max_wait_s=1000, turn_s=0.2)
        pool = AdapterPool(engine, AnywhereStore(tmp_path, DirectoryStore(tmp_path)), slots + spare, slots, limits)
        await asyncio.gather(*(one(pool, engine, number, request) for number, request in enumerate(requests)))
        await asyncio.sleep(10)
        assert pool.resident == engine.resident
        await pool.retire(pool.resident)
        assert engine.resident == set(), "someone still holds what nobody uses"

    run(main())
    assert {number for number, request in enumerate(requests) if request.leaves_after_s is None} <= served


class AnywhereStore(AdapterStore):
    def path(self, adapter: AdapterRevision) -> Path:
        return Path("/nowhere") / adapter.revision
