"""Limits of a key hold exactly, whatever other callers do."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from serve.callers.ledger import BackendUnreachable, Decision, LocalLedger, RateLimit, Reservation
from serve.callers.rate_limits import Limiter
from serve.catalogue.adapter_store import AdapterStore
from serve.engine.token_counter import Tokens, current_counter
from tests.serve.fakes import FakeEngine, respond
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
from tests.serve.virtual_time import skip


async def test_of_200_at_once_exactly_as_many_as_may_get_through(server: Guarded, client: httpx.AsyncClient) -> None:
    headers = server.key("team-a", limits={"requests_per_minute": 50})

    answers = await asyncio.gather(*(client.post(PATH, json=ask(), headers=headers) for _ in range(200)))

    assert Counter(answer.status_code for answer in answers) == {200: 50, 429: 150}
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert code(refused) == (429, "rate_limit_exceeded")
    assert refused.json()["error"]["type"] == "requests"
    assert 0 < int(refused.headers["retry-after"]) <= 60
    assert refused.headers["x-ratelimit-limit-requests"] == "50"
    assert {answer.headers["x-ratelimit-remaining-requests"] for answer in answers} == {str(left) for left in range(50)}
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    other = await client.post(PATH, json=ask(), headers=server.key("team-b", limits={"requests_per_minute": 1}))
    assert other.status_code == 200


async def test_a_limit_of_each_model_and_one_of_all_hold_together(server: Guarded, client: httpx.AsyncClient) -> None:
    headers = server.key(
        "team-a", limits={"requests_per_minute": 5}, limits_per_model={"?r*": {"requests_per_minute": 2}}
    )

    async def admitted(model: str, times: int) -> int:
        answers = [await client.post(PATH, json=ask(model), headers=headers) for _ in range(times)]
        return sum(answer.status_code == 200 for answer in answers)

    assert await admitted("french", 4) == 2
    assert await admitted("german", 2) == 2, "which has no limit of its own"
    assert await admitted(BASE_MODEL, 4) == 1, "what one model refused did not count against all"
    refused = await client.post(PATH, json=ask("french"), headers=headers)
    assert "the key `team-a`" in refused.json()["error"]["message"]


async def test_tokens_are_reserved_before_and_settled_to_what_was_used(
    server: Guarded, client: httpx.AsyncClient
) -> None:
    server.engine.context_tokens = 1000
    headers = server.key("team-a", limits={"tokens_per_minute": 400})

    first = await client.post(PATH, json=ask(tokens=100, prompt="the rain in spain"), headers=headers)
    assert int(first.headers["x-ratelimit-remaining-tokens"]) < 300 - 3, "its prompt may be longer than it was"
    again = await client.post(PATH, json=ask(tokens=100, prompt="the rain in spain"), headers=headers)
    reserved = 300 - int(first.headers["x-ratelimit-remaining-tokens"])
    assert int(again.headers["x-ratelimit-remaining-tokens"]) == 400 - 103 - 100 - reserved

    refused = await client.post(PATH, json=ask(tokens=100), headers=headers)
    assert refused.status_code == 200, "206 used, so 194 are left"
    refused = await client.post(PATH, json=ask(tokens=100), headers=headers)
    assert (code(refused), refused.json()["error"]["type"]) == ((429, "rate_limit_exceeded"), "tokens")
    assert "x-should-retry" not in refused.headers


async def test_small_requests_get_nearly_all_of_a_small_limit(server: Guarded, client: httpx.AsyncClient) -> None:
    headers, used = server.key("team-a", limits={"tokens_per_minute": 300}), 0

    while (answer := await client.post(PATH, json=ask(tokens=4), headers=headers)).status_code == 200:
        used += answer.json()["usage"]["total_tokens"]

    assert 300 - 30 < used <= 300
    assert f"{used} are used and 0 reserved" in answer.json()["error"]["message"]


async def test_a_burst_is_told_to_come_back_when_running_requests_give_back_what_they_reserve(
    server: Guarded, client: httpx.AsyncClient
) -> None:
    headers, go_on = server.key("team-a", limits={"tokens_per_minute": 100}), asyncio.Event()

    async def slowly(scope: Scope, receive: Receive, send: Send) -> None:
        await go_on.wait()
        counter = current_counter()
        assert counter is not None
        counter.prompt += 3
        await respond(send, 200, b"{}")

    server.engine.handler = slowly
    running = asyncio.create_task(client.post(PATH, json=ask(tokens=60), headers=headers))
    await until(lambda: server.gateway.policy.engine_queue.running == 1)
    refused = await client.post(PATH, json=ask(tokens=60), headers=headers)
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    assert "0 are used and " in refused.json()["error"]["message"]
    assert "reserved by running requests" in refused.json()["error"]["message"]
    go_on.set()
    await running

    assert (await client.post(PATH, json=ask(tokens=60), headers=headers)).status_code == 200


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
    await until(lambda: server.gateway.policy.limiter.running == 3)
    refused = await client.post(PATH, json=ask(), headers=headers)
    assert code(refused) == (429, "rate_limit_exceeded")
    assert "3 concurrent requests" in refused.json()["error"]["message"]

    go_on.set()
    assert {(await task).status_code for task in running} == {200}
    assert (await client.post(PATH, json=ask(), headers=headers)).status_code == 200


async def test_a_caller_that_leaves_gives_its_place_back_and_pays_what_it_reserved(
    server: Guarded, client: httpx.AsyncClient
) -> None:
    server.engine.context_tokens = 1000
    headers = server.key("team-a", limits={"concurrent_requests": 1, "tokens_per_minute": 300})

    async def forever(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    server.engine.handler = forever
    running = asyncio.create_task(client.post(PATH, json=ask(tokens=100), headers=headers))
    await until(lambda: server.gateway.policy.engine_queue.running == 1)
    running.cancel()
    await asyncio.wait({running})

    policy = server.gateway.policy
    assert (policy.limiter.running, policy.engine_queue.running, policy.slow_clients.guarded_responses) == (0, 0, 0)
    server.engine.handler = generate
    answered = await client.post(PATH, json=ask(tokens=4), headers=headers)
    assert answered.status_code == 200
    assert int(answered.headers["x-ratelimit-remaining-tokens"]) < 200


async def test_a_refused_request_counts_neither_against_the_limit_nor_as_usage(
    engine: FakeEngine, store: AdapterStore, tmp_path: Path
) -> None:
    server = await guarded_gateway(tmp_path, store, engine, max_running_requests=1, max_waiting_requests=1)
    headers = server.key("team-a", limits={"requests_per_minute": 3, "tokens_per_minute": 10_000})
    go_on, queue = asyncio.Event(), server.gateway.policy.engine_queue

    async def slowly(scope: Scope, receive: Receive, send: Send) -> None:
        await go_on.wait()
        await generate(scope, receive, send)

    engine.handler = slowly
    async with calling(server.gateway) as client:
        admitted = [asyncio.create_task(client.post(PATH, json=ask(), headers=headers)) for _ in range(2)]
        await until(lambda: (queue.running, queue.waiting) == (1, 1))
        for model in (BASE_MODEL, "french") * 3:
            assert code(await client.post(PATH, json=ask(model), headers=headers)) == (503, "engine_queue_full")
        go_on.set()
        assert {(await task).status_code for task in admitted} == {200}

        last = await client.post(PATH, json=ask(), headers=headers)
        assert (last.status_code, last.headers["x-ratelimit-remaining-requests"]) == (200, "0")
        assert code(await client.post(PATH, json=ask(), headers=headers)) == (429, "rate_limit_exceeded")
    today = datetime.now(UTC).date()
    assert [row["requests"] for row in server.meter.read(today - timedelta(days=1), today)] == [3]


async def test_a_request_whose_engine_dies_does_not_count_because_the_proxy_repeats_it(
    server: Guarded, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.gateway.response._REPLICA_EXIT_S", 0)
    headers = server.key("team-a", limits={"requests_per_minute": 1})

    async def die(scope: Scope, receive: Receive, send: Send) -> None:
        server.engine.is_dead = True
        await respond(send, 500, b"{}")

    server.engine.handler = die
    assert code(await client.post(PATH, json=ask(), headers=headers)) == (503, "engine_unavailable")
    server.engine.is_dead, server.engine.handler = False, generate

    assert (await client.post(PATH, json=ask(), headers=headers)).status_code == 200
    today = datetime.now(UTC).date()
    assert [row["requests"] for row in server.meter.read(today - timedelta(days=1), today)] == [1]


class Broken(LocalLedger):
    """A ledger that can't be reached."""

    async def reserve(self, reservation: Reservation) -> Decision:
        raise BackendUnreachable("gone")


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
        assert {answer.status_code for answer in answers} == {status}
        assert (await client.post(PATH, json=ask(), headers=unlimited)).status_code == 200
    errors = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(errors) == 1, "an outage is logged once"
    if status == 503:
        assert code(answers[0]) == (503, "limits_unavailable")


class Failing(LocalLedger):
    """A ledger that meets an error which nobody thought of."""

    def __init__(self, lease_s: float) -> None:
        super().__init__(lease_s)
        self.renewals = self.settlements = 0

    async def renew(self, reservations: Iterable[Reservation]) -> None:
        self.renewals += 1
        raise RuntimeError("dictionary changed size during iteration")

    async def settle(self, reservation: Reservation, tokens: int | None) -> None:
        self.settlements += 1
        raise RuntimeError("dictionary changed size during iteration")


@pytest.mark.skippable_time
async def test_leases_are_renewed_on_after_an_unexpected_error_which_is_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    backend = Failing(lease_s=15)
    limiter = Limiter(backend, 15)
    with caplog.at_level(logging.ERROR):
        async with limiter.admit((RateLimit("team-a", None, None, 1),), 1, Tokens()):
            for renewals in range(1, 5):
                skip(5)
                await until(lambda renewals=renewals: backend.renewals == renewals)  # type: ignore[misc]

    assert backend.settlements == 1
    assert len([record for record in caplog.records if "changed size" in record.getMessage()]) == 1


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
