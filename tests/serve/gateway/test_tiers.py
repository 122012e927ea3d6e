"""Many adapters and few slots, as callers of a gateway see them."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from serve.adapters.slot_scheduler import WaitLimits
from tests.serve.fakes import FakeEngine, respond
from tests.serve.one_slot import (
    Replica,
    completion,
    registered,
    replica,
    say_your_name,
    until,
)

__all__ = ["replica"]  # a fixture

# The limits below are parts of a second, which a busy machine needs for anything.
pytestmark = pytest.mark.virtual_time


async def test_a_thousand_adapters_are_registered_and_only_what_fits_is_loaded(
    replica: Replica, engine: FakeEngine
) -> None:
    replica.reconciler.log.follow = lambda _: registered(1000)  # type: ignore[method-assign]

    await replica.reconciler.sync()

    assert len(engine.loads) == 3
    assert {adapter.name for adapter in engine.resident} == {"adapter-00997", "adapter-00998", "adapter-00999"}, (
        "the newest"
    )
    async with replica.client() as client:
        assert len((await client.get("/v1/models")).json()["data"]) == 1001
        assert (await client.get("/v1/models/adapter-00500")).status_code == 200
        unknown = (await client.post("/v1/completions", json={"model": "nobody"})).json()["error"]["message"]
    assert len(unknown) < 1000
    assert "more: see GET /v1/models" in unknown


async def test_each_of_a_thousand_answers_as_itself_under_churn(replica: Replica, engine: FakeEngine) -> None:
    replica = Replica(engine, replica.pool._store, Path(), replica.reconciler.log, WaitLimits(2000, 2000, 60, 0.01))
    replica.reconciler.catalogue = catalogue = registered(1000)
    engine.handler = say_your_name
    expected = {adapter.name: adapter.engine_name for adapter in catalogue.current}

    async with replica.client() as client:
        names = [f"adapter-{number * 7 % 1000:05}" for number in range(150)] * 2
        answers = await asyncio.gather(*(client.post("/v1/completions", json={"model": name}) for name in names))

    assert [answer.json()["choices"][0]["text"] for answer in answers] == [expected[name] for name in names]
    assert len(engine.resident) <= 3
    assert Counter(engine.loads).most_common(1)[0][1] == 1, "requests for one adapter were served by one load"


async def test_who_waits_too_long_or_too_many_is_told_when_to_come_back(replica: Replica, engine: FakeEngine) -> None:
    replica.reconciler.catalogue = registered(5)
    finish = asyncio.Event()

    async def hang(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await finish.wait()
        await respond(send, 200, completion("at last"))

    engine.handler = hang

    async with replica.client() as client:

        async def ask(number: int, caller: str) -> httpx.Response:
            return await client.post(
                "/v1/completions", json={"model": f"adapter-{number:05}"}, headers={"x-graft-caller": caller}
            )

        running = asyncio.create_task(ask(0, "first"))
        await until(lambda: bool(replica.pool.slots.running_adapters))
        waiting = [asyncio.create_task(ask(number, str(number))) for number in (1, 2, 3)]
        waiting.append(asyncio.create_task(ask(1, "1")))
        await until(lambda: replica.pool.slots.waiting == 4)
        of_greedy, of_another = await ask(2, "1"), await ask(2, "another")
        assert replica.pool.slots.waiting == 4, "they were refused while the others still waited"
        gave_up = await asyncio.gather(*waiting)
        finish.set()
        assert (await running).status_code == 200

    for response, status, code in [
        (of_greedy, 429, "caller_queue_full"),
        (of_another, 503, "adapter_queue_full"),
        *((answer, 503, "adapter_wait_too_long") for answer in gave_up),
    ]:
        assert (response.status_code, response.json()["error"]["code"]) == (status, code)
        assert int(response.headers["retry-after"]) >= 1
