"""Keys, limits, usage and overload on two real replicas behind the real proxy."""

from __future__ import annotations

import asyncio
import contextlib
import json
import statistics
from collections import Counter
from datetime import timedelta
from typing import Any

import httpx

from serve.callers import key_admin
from tests.e2e.callers.conftest import (
    LONG,
    MAX_RUNNING,
    PATH,
    Guarded,
    code,
    completion,
    for_long,
    stream,
    total,
    until,
)
from tests.e2e.conftest import REPLICAS

TURN_TOKENS = 300  # of one request of a burst: long enough for the burst to be waiting


async def test_a_key_opens_and_nothing_else_does(guarded: Guarded) -> None:
    secret = guarded.key("only-french", models=("french",))
    async with (
        guarded.client(secret) as client,
        httpx.AsyncClient(base_url=guarded.server.url, timeout=60) as without_key,
    ):
        assert (await client.post(PATH, json=completion("french"))).status_code == 200
        assert (
            await without_key.post(PATH, json=completion("french"), headers={"x-api-key": secret})
        ).status_code == 200
        assert code(await without_key.post(PATH, json=completion("french"))) == (401, "invalid_api_key")
        assert [model["id"] for model in (await client.get("/v1/models")).json()["data"]] == ["french"]
        hidden = await client.post(PATH, json=completion("german"))
        unknown = await client.post(PATH, json=completion("nobody"))
        assert code(hidden) == (404, "model_not_found")
        assert hidden.text.replace("german", "NAME") == unknown.text.replace("nobody", "NAME")


async def test_every_answer_carries_the_id_of_its_request_once(guarded: Guarded) -> None:
    async with guarded.client(guarded.key("ids")) as client:
        for model in ("french", "tiny-llama", "nobody"):
            with_id = await client.post(PATH, json=completion(model), headers={"x-request-id": "mine"})
            without_id = await client.post(PATH, json=completion(model))
            assert with_id.headers.get_list("x-request-id") == ["mine"]
            assert len(without_id.headers.get_list("x-request-id")) == 1
        unknown = await client.post(PATH, headers={"authorization": "Bearer no", "x-request-id": "mine"})
        assert (unknown.status_code, unknown.headers.get_list("x-request-id")) == (401, ["mine"])


async def test_of_200_at_once_exactly_as_many_as_may_get_through_both_replicas(guarded: Guarded) -> None:
    async with guarded.client(guarded.key("fifty", requests_per_minute=50)) as client:
        answers = await asyncio.gather(*(client.post(PATH, json=completion(tokens=2)) for _ in range(200)))

    assert Counter(answer.status_code for answer in answers) == {200: 50, 429: 150}
    remaining = sorted(
        int(answer.headers["x-ratelimit-remaining-requests"]) for answer in answers if answer.status_code == 200
    )
    assert remaining == list(range(50)), "each was told what it left"
    assert {answer.headers["x-ratelimit-limit-requests"] for answer in answers} == {"50"}
    assert all(0 < int(answer.headers["retry-after"]) <= 60 for answer in answers if answer.status_code == 429)


async def test_tokens_of_all_replicas_stay_within_the_limit_and_are_settled_exactly(guarded: Guarded) -> None:
    limit = 2000
    async with guarded.client(guarded.key("tokens", tokens_per_minute=limit)) as client:
        answers = await asyncio.gather(*(client.post(PATH, json=completion(tokens=50)) for _ in range(100)))
        used = sum(answer.json()["usage"]["total_tokens"] for answer in answers if answer.status_code == 200)
        assert Counter(answer.status_code for answer in answers)[429] > 0
        while (answer := await client.post(PATH, json=completion(tokens=1))).status_code == 200:
            used += answer.json()["usage"]["total_tokens"]

    assert used <= limit
    assert int(answer.headers["x-ratelimit-remaining-tokens"]) == limit - used, "all that was reserved is settled"


async def test_on_every_route_at_least_as_much_is_reserved_as_is_used(guarded: Guarded) -> None:
    limit, model, chat = 10_000, "tiny-llama", [{"role": "user", "content": "Is the rain over?"}]
    requests: dict[str, dict[str, Any]] = {
        PATH: completion(tokens=3, n=2, temperature=1),
        "/v1/chat/completions": {"model": model, "messages": chat, "max_tokens": 3},
        "/v1/responses": {"model": model, "input": "Is the rain over?", "max_output_tokens": 3},
        "/v1/messages": {"model": model, "messages": chat, "max_tokens": 3},
    }
    for path, request in requests.items():
        async with guarded.client(guarded.key(path[4:].replace("/", "-"), tokens_per_minute=limit)) as client:
            answer = await client.post(path, json=request)
        assert answer.status_code == 200, answer.text
        reserved = limit - int(answer.headers["x-ratelimit-remaining-tokens"])
        usage = answer.json()["usage"]
        used = usage.get("total_tokens") or usage["input_tokens"] + usage["output_tokens"]
        assert used <= reserved, path


async def test_concurrent_requests_are_bounded_over_both_replicas_and_never_refused_in_a_row(guarded: Guarded) -> None:
    async with guarded.client(guarded.key("three", concurrent_requests=3)) as client:
        answers = await asyncio.gather(*(client.post(PATH, json=for_long(n=4)) for _ in range(30)))
        one_by_one = [(await client.post(PATH, json=completion(tokens=1))).status_code for _ in range(30)]

    assert Counter(answer.status_code for answer in answers) == {200: 3, 429: 27}
    assert set(one_by_one) == {200}


async def test_usage_is_what_the_answers_say_streams_included(guarded: Guarded) -> None:
    expected: dict[str, Counter[str]] = {"french": Counter(), "tiny-llama": Counter()}
    async with guarded.client(guarded.key("metered")) as client:
        for model, counts in expected.items():
            for request in (
                completion(model, 5),
                completion(model, 3, n=2, temperature=1),
                completion(model, 4, prompt=["a", "b c d"]),
            ):
                used = (await client.post(PATH, json=request)).json()["usage"]
                counts.update(requests=1, prompt=used["prompt_tokens"], completion=used["completion_tokens"])
                async with stream(client, request | {"stream_options": {"include_usage": True}}) as response:
                    lines = [line async for line in response.aiter_lines() if line.startswith("data: {")]
                used = json.loads(lines[-1].removeprefix("data: "))["usage"]
                counts.update(requests=1, prompt=used["prompt_tokens"], completion=used["completion_tokens"])

    async def of_key() -> dict[str, Counter[str]]:
        rows = [row for row in (await guarded.admin("usage"))["usage"] if row["key"] == "metered"]
        return {
            row["model"]: Counter(
                requests=row["requests"], prompt=row["prompt_tokens"], completion=row["completion_tokens"]
            )
            for row in rows
        }

    async def is_counted() -> bool:
        return await of_key() == expected

    with contextlib.suppress(TimeoutError):
        await until(is_counted)  # the other replica writes it every few seconds
    assert await of_key() == expected
    listed = await asyncio.to_thread(guarded.server.command, "usage", "--json")
    assert {row["key"] for row in json.loads(listed.stdout)["usage"]} >= {"metered"}


async def test_a_caller_that_leaves_frees_the_engine(guarded: Guarded) -> None:
    async with guarded.client(guarded.key("leaves", concurrent_requests=4)) as client:

        async def as_many_as_before() -> bool:
            answers = await asyncio.gather(*(client.post(PATH, json=completion(tokens=1)) for _ in range(4)))
            return all(answer.status_code == 200 for answer in answers)

        for model in ("tiny-llama", "french"):
            before, answered = await guarded.generated_tokens(), 0

            async def ask_on(streamed: bool, model: str = model) -> None:
                nonlocal answered
                while True:
                    async with client.stream("POST", PATH, json=completion(model, LONG, stream=streamed)) as response:
                        assert response.status_code == 200, await response.aread()
                        async for _ in response.aiter_bytes():
                            pass
                    answered += 1

            callers = [asyncio.create_task(ask_on(number % 2 == 0)) for number in range(4)]
            await until(lambda: total(guarded, 4))
            for caller in callers:
                caller.cancel()
            assert all(
                isinstance(outcome, asyncio.CancelledError)
                for outcome in await asyncio.gather(*callers, return_exceptions=True)
            )
            await until(lambda: total(guarded, 0))
            assert await guarded.generated_tokens() - before < (answered + 4) * LONG, (
                "the last four were not told to the end"
            )
            await until(as_many_as_before)


async def test_one_callers_burst_costs_another_one_turn_each(guarded: Guarded) -> None:
    """Counted in requests of the burst that ended meanwhile, not in seconds. Whoever is refused in the burst comes back
    when the answer says so, so that the burst outlasts the other caller's requests on a machine of any speed."""
    burst_done, meanwhile, refusals = 0, [], Counter[tuple[int, str]]()
    async with guarded.client(guarded.key("burst")) as loud, guarded.client(guarded.key("quiet")) as quiet:

        async def ask_again_and_again() -> None:
            nonlocal burst_done
            while True:
                response = await loud.post(PATH, json=completion(tokens=TURN_TOKENS))
                if response.status_code == 200:
                    burst_done += 1
                else:
                    refusals[code(response)] += 1
                    await asyncio.sleep(int(response.headers["retry-after"]))

        burst = [asyncio.create_task(ask_again_and_again()) for _ in range(200)]
        await until(lambda: total(guarded, REPLICAS * MAX_RUNNING))
        for _ in range(5):
            before = burst_done
            response = await quiet.post(PATH, json=completion(tokens=TURN_TOKENS // 10))
            assert response.status_code == 200, response.text
            meanwhile.append(burst_done - before)
        assert not any(caller.done() for caller in burst), "the burst is not over"
        for caller in burst:
            caller.cancel()
        await asyncio.gather(*burst, return_exceptions=True)

    # Its place comes free with the first of those that run on its replica; until it is done itself, they all may be.
    # In the middle: now and then the machine stands still, and what is told afterwards is told at once.
    assert statistics.median(meanwhile) <= 3 * REPLICAS * MAX_RUNNING, meanwhile
    assert (429, "caller_queue_full") in refusals, "the burst is more than may wait"
    # Where a replica is too busy to answer the proxy's own question, the proxy answers with a 503 of its own.
    assert {status for status, _ in refusals} <= {429, 503}
    assert (503, "engine_wait_too_long") not in refusals


async def test_keys_are_rotated_under_load_without_one_wrong_refusal(guarded: Guarded) -> None:
    good, statuses, stop = [guarded.key("rotated")], Counter[int](), asyncio.Event()
    async with httpx.AsyncClient(base_url=guarded.server.url, timeout=60) as client:

        async def load(number: int) -> None:
            while not stop.is_set():
                secret = good[-1 - number % min(2, len(good))]
                headers = {"authorization": f"Bearer {secret}"}
                statuses[(await client.post(PATH, json=completion(tokens=1), headers=headers)).status_code] += 1

        async def rotate() -> None:
            for _ in range(10):
                good.append(await asyncio.to_thread(key_admin.rotate, guarded.keys, "rotated", timedelta(minutes=5)))
                await asyncio.sleep(0.5)
            stop.set()

        await asyncio.gather(rotate(), *(load(number) for number in range(6)))
        assert set(statuses) == {200}
        key_admin.revoke(guarded.keys, "rotated")
        await asyncio.sleep(1.5)
        for secret in good[-2:]:
            refused = await client.post(PATH, json=completion(), headers={"authorization": f"Bearer {secret}"})
            assert code(refused) == (401, "invalid_api_key")
