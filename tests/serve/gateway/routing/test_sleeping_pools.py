"""A pool sleeps: the first request for it starts its engines, and all requests for it wait, for a bounded time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from serve.catalogue.adapter_store import AdapterStore
from serve.catalogue.added_pool import AddedPool
from serve.catalogue.catalogue import Catalogue
from serve.catalogue.entry import Audit
from serve.catalogue.pool_changes import add_pool, sleep_pool, wake_pool
from serve.observability.open_requests import OpenRequests
from serve.settings import PoolOptions
from tests.serve.gateway.routing.two_pools import MERGED, Replica, two_pools
from tests.serve.guarded import until


@asynccontextmanager
async def sleeping(store: AdapterStore, root: Path, **gateway: Any) -> AsyncIterator[tuple[Replica, Replica]]:
    """The first pool, and one that sleeps: no engine of it can be reached."""
    async with two_pools(store, root, second_is_added=True, **gateway) as (first, second):
        options = PoolOptions(sleep_after_s=60)
        ticket = AddedPool(name="ticket", base=MERGED, model_path=root, max_lora_rank=0, options=options)
        add_pool(first.log, ticket, [], Audit())
        sleep_pool(first.log, ticket, Audit())
        second.reachable = False
        await first.reconciler.follow()
        yield first, second


async def test_requests_for_a_sleeping_pool_wake_it_once_and_wait_until_it_answers(
    store: AdapterStore, tmp_path: Path
) -> None:
    async with sleeping(store, tmp_path) as (first, second):
        assert await first.get("/v1/models/ticket"), "it is listed"
        tasks = [asyncio.create_task(first.ask("ticket")) for _ in range(5)]
        await until(lambda: bool(first.woken))
        assert not first.log.read().pools["ticket"].asleep
        await first.reconciler.follow()
        tasks.append(asyncio.create_task(first.ask("ticket")))  # while the engines start
        await asyncio.sleep(2.5)
        assert not any(task.done() for task in tasks), "longer than for a pool that runs"

        second.reachable = True
        answers = await asyncio.gather(*tasks)

        assert [(answer.status_code, answer.json()["pool"]) for answer in answers] == [(200, "ticket")] * 6
        assert first.woken == ["ticket"]


async def test_a_request_that_waits_too_long_gets_a_503_and_its_repetition_does_not_wait_again(
    store: AdapterStore, tmp_path: Path
) -> None:
    async with sleeping(store, tmp_path, max_wake_s=3) as (first, _):
        late = await first.ask("ticket")
        await first.reconciler.follow()
        began_s = asyncio.get_running_loop().time()
        repeated = await first.ask("ticket")

        assert (late.status_code, late.json()["error"]["code"]) == (503, "pool_asleep")
        assert late.headers["retry-after"] == "10"
        assert "ticket was asleep" in late.json()["error"]["message"]
        assert set(first.given_up) == {"ticket"}, "if its engines can't start, the next request tries again"
        assert (repeated.status_code, repeated.json()["error"]["code"]) == (503, "pool_unavailable")
        assert asyncio.get_running_loop().time() - began_s < 30


async def test_no_more_requests_wait_than_may_and_the_others_are_told_at_once(
    store: AdapterStore, tmp_path: Path
) -> None:
    async with sleeping(store, tmp_path, max_waiting_requests=2, max_waiting_per_caller=2) as (first, second):
        tasks = [asyncio.create_task(first.ask("ticket")) for _ in range(3)]
        done, waiting = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        refused = [task.result() for task in done]
        second.reachable = True
        answered = await asyncio.gather(*waiting)

        assert [answer.json()["error"]["code"] for answer in refused] == ["pool_asleep"]
        assert [answer.status_code for answer in answered] == [200, 200]


async def test_a_request_that_comes_just_after_a_pool_fell_asleep_wakes_it(store: AdapterStore, tmp_path: Path) -> None:
    async with sleeping(store, tmp_path) as (first, second):
        wake_pool(first.log, "ticket", Audit())
        await first.reconciler.follow()
        sleep_pool(second.log, second.log.read().pools["ticket"], Audit())  # which the first replica does not know yet
        old = add_age(first.reconciler.catalogue, "ticket")
        first.reconciler.catalogue = old
        task = asyncio.create_task(first.ask("ticket"))
        await until(lambda: bool(first.woken))
        second.reachable = True

        assert (await task).status_code == 200


def add_age(catalogue: Catalogue, name: str) -> Catalogue:
    """As if the pool had been woken long ago."""
    pool = replace(catalogue.pools[name], woken_at=datetime(2026, 1, 1, tzinfo=UTC))
    return replace(catalogue, pools={**catalogue.pools, name: pool})


async def test_a_health_check_finds_a_sleeping_pool_ready_and_does_not_wake_it(
    store: AdapterStore, tmp_path: Path
) -> None:
    async with sleeping(store, tmp_path) as (first, _):
        assert (await first.get_status("/health/ticket"), first.woken) == (200, [])


async def test_a_replica_is_idle_from_the_end_of_its_last_request() -> None:
    requests = OpenRequests()
    with requests.counted():
        with requests.counted():
            pass
        assert requests.idle_s == 0
    await asyncio.sleep(0.05)
    assert requests.idle_s >= 0.05
    requests.begin()
    assert requests.idle_s < 0.05
