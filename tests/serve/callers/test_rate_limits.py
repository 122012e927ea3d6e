"""How much a caller may ask: exactly so much, whoever else asks."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from pathlib import Path

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from serve.ledger import Claim, LedgerUnreachable, LocalLedger, Verdict
from serve.store import AdapterStore
from tests.serve.fakes import FakeEngine
from tests.serve.guarded import (
    BASE_MODEL,
    PATH,
    Guarded,
    ask,
    code,
    generate,
    guarded_gateway,
    until,
)
from tests.serve.one_replica import calling


async def test_of_200_at_once_exactly_as_many_as_may_get_through(server: Guarded, client: httpx.AsyncClient) -> None:
    headers = server.key("team-a", limits={"requests_per_minute": 50})

    answers = await asyncio.gather(*(client.post(PATH, json=ask(), headers=headers) for _ in range(200)))

    assert Counter(it.status_code for it in answers) == {200: 50, 429: 150}
    refused = next(it for it in answers if it.status_code == 429)
    assert code(refused) == (429, "rate_limit_exceeded")
    assert refused.json()["error"]["type"] == "requests"
    assert 0 < int(refused.headers["retry-after"]) <= 60
    assert refused.headers["x-ratelimit-limit-requests"] == "50"
    assert {it.headers["x-ratelimit-remaining-requests"] for it in answers} == {str(left) for left in range(50)}
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    other = await client.post(PATH, json=ask(), headers=server.key("team-b", limits={"requests_per_minute": 1}))
    assert other.status_code == 200


async def test_a_limit_of_each_model_and_one_of_all_hold_together(server: Guarded, client: httpx.AsyncClient) -> None:
    headers = server.key(
        "team-a", limits={"requests_per_minute": 5}, limits_per_model={"?r*": {"requests_per_minute": 2}}
    )

    async def admitted(model: str, times: int) -> int:
        answers = [await client.post(PATH, json=ask(model), headers=headers) for _ in range(times)]
        return sum(it.status_code == 200 for it in answers)

    assert await admitted("french", 4) == 2
    assert await admitted("german", 2) == 2, "which has no limit of its own"
    assert await admitted(BASE_MODEL, 4) == 1, "what one model refused did not count against all"
    refused = await client.post(PATH, json=ask("french"), headers=headers)
    assert "the key `team-a`" in refused.json()["error"]["message"]


async def test_tokens_are_reserved_before_and_settled_to_what_was_used(
    server: Guarded, client: httpx.AsyncClient
) -> None:
    headers = server.key("team-a", limits={"tokens_per_minute": 400})

    first = await client.post(PATH, json=ask(tokens=100), headers=headers)
    assert int(first.headers["x-ratelimit-remaining-tokens"]) < 300 - 3, "its prompt may be longer than it was"
    again = await client.post(PATH, json=ask(tokens=100), headers=headers)
    reserved = 300 - int(first.headers["x-ratelimit-remaining-tokens"])
    assert int(again.headers["x-ratelimit-remaining-tokens"]) == 400 - 103 - 100 - reserved

    refused = await client.post(PATH, json=ask(tokens=100), headers=headers)
    assert refused.status_code == 200, "206 used, so 194 are left"
    refused = await client.post(PATH, json=ask(tokens=100), headers=headers)
    assert (code(refused), refused.json()["error"]["type"]) == ((429, "rate_limit_exceeded"), "tokens")
    assert "x-should-retry" not in refused.headers


async def test_a_request_larger_than_the_limit_is_told_that_it_will_never_get_through(
    server: Guarded, client: httpx.AsyncClient
) -> None:
    headers = server.key("team-a", limits={"tokens_per_minute": 40})

    refused = await client.post(PATH, json=ask(tokens=64), headers=headers)

    assert code(refused) == (429, "rate_limit_exceeded")
    assert "retry-after" not in refused.headers
    assert refused.headers["x-should-retry"] == "false"
    assert "more than that" in refused.json()["error"]["message"]


async def test_concurrent_requests_are_bounded_and_come_back(server: Guarded, client: httpx.AsyncClient) -> None:
    headers = server.key("team-a", limits={"concurrent_requests": 3})
    go_on = asyncio.Event()

    async def slowly(scope: Scope, receive: Receive, send: Send) -> None:
        await go_on.wait()
        await generate(scope, receive, send)

    server.engine.handler = slowly
    running = [asyncio.create_task(client.post(PATH, json=ask(), headers=headers)) for _ in range(3)]
    await until(lambda: server.gateway.passages.limiter.running == 3)
    refused = await client.post(PATH, json=ask(), headers=headers)
    assert code(refused) == (429, "rate_limit_exceeded")
    assert "3 concurrent requests" in refused.json()["error"]["message"]

    go_on.set()
    assert {(await it).status_code for it in running} == {200}
    assert (await client.post(PATH, json=ask(), headers=headers)).status_code == 200


async def test_a_caller_that_leaves_gives_its_place_back_and_pays_what_it_reserved(
    server: Guarded, client: httpx.AsyncClient
) -> None:
    headers = server.key("team-a", limits={"concurrent_requests": 1, "tokens_per_minute": 300})

    async def forever(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    server.engine.handler = forever
    running = asyncio.create_task(client.post(PATH, json=ask(tokens=100), headers=headers))
    await until(lambda: server.gateway.passages.places.taken == 1)
    running.cancel()
    await asyncio.wait({running})

    passages = server.gateway.passages
    assert (passages.limiter.running, passages.places.taken, passages.readers.watched_now) == (0, 0, 0)
    server.engine.handler = generate
    answered = await client.post(PATH, json=ask(tokens=4), headers=headers)
    assert answered.status_code == 200
    assert int(answered.headers["x-ratelimit-remaining-tokens"]) < 200


class Broken(LocalLedger):
    """Books that can't be reached."""

    async def reserve(self, claim: Claim) -> Verdict:
        raise LedgerUnreachable("gone")


@pytest.mark.parametrize(("choice", "status"), [("refuse", 503), ("allow", 200)])
async def test_while_limits_cannot_be_counted_callers_with_limits_get_what_the_setting_says(
    engine: FakeEngine, store: AdapterStore, tmp_path: Path, choice: str, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    engine.handler = generate
    server = await guarded_gateway(tmp_path, store, engine, Broken(1), limits_when_unavailable=choice)
    limited, unlimited = server.key("limited", limits={"requests_per_minute": 1}), server.key("unlimited")

    async with calling(server.gateway) as client:
        with caplog.at_level(logging.ERROR):
            answers = [await client.post(PATH, json=ask(), headers=limited) for _ in range(3)]
        assert {it.status_code for it in answers} == {status}
        assert (await client.post(PATH, json=ask(), headers=unlimited)).status_code == 200
    told = [it for it in caplog.records if it.levelno >= logging.ERROR]
    assert len(told) == 1, "an outage is told once"
    if status == 503:
        assert code(answers[0]) == (503, "limits_unavailable")


async def test_output_is_capped_and_who_asks_for_more_is_told(
    engine: FakeEngine, store: AdapterStore, tmp_path: Path
) -> None:
    engine.handler = generate
    server = await guarded_gateway(tmp_path, store, engine, max_output_tokens=8)
    headers = server.key("team-a")

    async with calling(server.gateway) as client:
        for model in (BASE_MODEL, "french"):
            asked = (await client.post(PATH, json={"model": model, "prompt": "hi"}, headers=headers)).json()["asked"]
            assert asked["max_tokens"] == 8
            assert asked["prompt"] == "hi"
        assert (await client.post(PATH, json=ask(tokens=8), headers=headers)).status_code == 200
        refused = await client.post(PATH, json=ask(tokens=9), headers=headers)
    assert code(refused) == (400, "output_too_long")
    assert refused.json()["error"]["param"] == "max_tokens"
