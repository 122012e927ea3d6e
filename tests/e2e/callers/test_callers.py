"""Keys, limits, usage and overload on two real replicas behind the real proxy."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import psutil

from serve import key_writing
from serve.config import GatewaySettings
from serve.state import StateDir
from tests.e2e.callers.conftest import LONG, MAX_RUNNING, PATH, Guarded, completion, stream, until
from tests.e2e.conftest import REPLICAS

LEASE_S: float = GatewaySettings.model_fields["lease_s"].default
CONNECTIONS = 10_000


def for_long(n: int) -> dict[str, Any]:
    """Runs on while a machine that is shared with others stands still for some seconds."""
    return completion(tokens=LONG, n=n, temperature=1)


def code(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


async def test_a_key_opens_and_nothing_else_does(guarded: Guarded) -> None:
    secret = guarded.key("only-french", models=("french",))
    async with guarded.client(secret) as client, httpx.AsyncClient(base_url=guarded.server.url, timeout=60) as stranger:
        assert (await client.post(PATH, json=completion("french"))).status_code == 200
        assert (await stranger.post(PATH, json=completion("french"), headers={"x-api-key": secret})).status_code == 200
        assert code(await stranger.post(PATH, json=completion("french"))) == (401, "invalid_api_key")
        assert [it["id"] for it in (await client.get("/v1/models")).json()["data"]] == ["french"]
        hidden = await client.post(PATH, json=completion("german"))
        unknown = await client.post(PATH, json=completion("nobody"))
        assert code(hidden) == (404, "model_not_found")
        assert hidden.text.replace("german", "NAME") == unknown.text.replace("nobody", "NAME")


async def test_every_answer_carries_the_id_of_its_request_once(guarded: Guarded) -> None:
    async with guarded.client(guarded.key("ids")) as client:
        for model in ("french", "tiny-llama", "nobody"):
            told = await client.post(PATH, json=completion(model), headers={"x-request-id": "mine"})
            made = await client.post(PATH, json=completion(model))
            assert told.headers.get_list("x-request-id") == ["mine"]
            assert len(made.headers.get_list("x-request-id")) == 1
        unknown = await client.post(PATH, headers={"authorization": "Bearer no", "x-request-id": "mine"})
        assert (unknown.status_code, unknown.headers.get_list("x-request-id")) == (401, ["mine"])


async def test_of_200_at_once_exactly_as_many_as_may_get_through_both_replicas(guarded: Guarded) -> None:
    async with guarded.client(guarded.key("fifty", requests_per_minute=50)) as client:
        answers = await asyncio.gather(*(client.post(PATH, json=completion(tokens=2)) for _ in range(200)))

    assert Counter(it.status_code for it in answers) == {200: 50, 429: 150}
    left = sorted(int(it.headers["x-ratelimit-remaining-requests"]) for it in answers if it.status_code == 200)
    assert left == list(range(50)), "each was told what it left"
    assert {it.headers["x-ratelimit-limit-requests"] for it in answers} == {"50"}
    assert all(0 < int(it.headers["retry-after"]) <= 60 for it in answers if it.status_code == 429)


async def test_tokens_of_all_replicas_stay_within_the_limit_and_are_settled_exactly(guarded: Guarded) -> None:
    limit = 2000
    async with guarded.client(guarded.key("tokens", tokens_per_minute=limit)) as client:
        answers = await asyncio.gather(*(client.post(PATH, json=completion(tokens=50)) for _ in range(100)))
        used = sum(it.json()["usage"]["total_tokens"] for it in answers if it.status_code == 200)
        assert Counter(it.status_code for it in answers)[429] > 0
        while (answer := await client.post(PATH, json=completion(tokens=1))).status_code == 200:
            used += answer.json()["usage"]["total_tokens"]

    assert used <= limit
    assert int(answer.headers["x-ratelimit-remaining-tokens"]) == limit - used, "all that was reserved is settled"


async def test_concurrent_requests_are_bounded_over_both_replicas_and_never_refused_in_a_row(guarded: Guarded) -> None:
    async with guarded.client(guarded.key("three", concurrent_requests=3)) as client:
        answers = await asyncio.gather(*(client.post(PATH, json=for_long(n=4)) for _ in range(30)))
        one_by_one = [(await client.post(PATH, json=completion(tokens=1))).status_code for _ in range(30)]

    assert Counter(it.status_code for it in answers) == {200: 3, 429: 27}
    assert set(one_by_one) == {200}


async def test_usage_is_what_the_answers_say_streams_included(guarded: Guarded) -> None:
    expected: dict[str, Counter[str]] = {"french": Counter(), "tiny-llama": Counter()}
    async with guarded.client(guarded.key("metered")) as client:
        for model, told in expected.items():
            for request in (
                completion(model, 5),
                completion(model, 3, n=2, temperature=1),
                completion(model, 4, prompt=["a", "b c d"]),
            ):
                used = (await client.post(PATH, json=request)).json()["usage"]
                told.update(requests=1, prompt=used["prompt_tokens"], completion=used["completion_tokens"])
                async with stream(client, request | {"stream_options": {"include_usage": True}}) as response:
                    lines = [it async for it in response.aiter_lines() if it.startswith("data: {")]
                used = json.loads(lines[-1].removeprefix("data: "))["usage"]
                told.update(requests=1, prompt=used["prompt_tokens"], completion=used["completion_tokens"])

    async def of_key() -> dict[str, Counter[str]]:
        rows = [it for it in (await guarded.admin("usage"))["usage"] if it["key"] == "metered"]
        return {
            it["model"]: Counter(
                requests=it["requests"], prompt=it["prompt_tokens"], completion=it["completion_tokens"]
            )
            for it in rows
        }

    async def is_told() -> bool:
        return await of_key() == expected

    with contextlib.suppress(TimeoutError):
        await until(is_told, 15)  # the other replica writes it every few seconds
    assert await of_key() == expected
    listed = await asyncio.to_thread(guarded.server.command, "usage", "--json")
    assert {it["key"] for it in json.loads(listed.stdout)["usage"]} >= {"metered"}


async def test_a_caller_that_leaves_frees_the_engine(guarded: Guarded) -> None:
    async with guarded.client(guarded.key("leaves", concurrent_requests=4)) as client:

        async def as_many_as_before() -> bool:
            answers = await asyncio.gather(*(client.post(PATH, json=completion(tokens=1)) for _ in range(4)))
            return all(it.status_code == 200 for it in answers)

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
                isinstance(it, asyncio.CancelledError) for it in await asyncio.gather(*callers, return_exceptions=True)
            )
            await until(lambda: total(guarded, 0), LEASE_S / 2)
            assert await guarded.generated_tokens() - before < (answered + 4) * LONG, (
                "the last four were not told to the end"
            )
            await until(as_many_as_before, LEASE_S / 2)


async def total(guarded: Guarded, number: int) -> bool:
    return sum(await guarded.running()) == number


async def test_one_callers_burst_costs_another_one_turn_each(guarded: Guarded) -> None:
    """In turns, not in seconds: what the other one got meanwhile."""
    burst_done, meanwhile = 0, []
    async with guarded.client(guarded.key("burst")) as loud, guarded.client(guarded.key("quiet")) as quiet:

        async def ask_loud() -> int:
            nonlocal burst_done
            status = (await loud.post(PATH, json=completion(tokens=800))).status_code
            burst_done += status == 200
            return status

        burst = [asyncio.create_task(ask_loud()) for _ in range(200)]
        await until(lambda: total(guarded, REPLICAS * MAX_RUNNING))
        for _ in range(5):
            before = burst_done
            assert (await quiet.post(PATH, json=completion(tokens=60))).status_code == 200
            meanwhile.append(burst_done - before)
        assert not all(it.done() for it in burst), "the burst is not over"
        statuses = Counter(await asyncio.gather(*burst))

    # Its place comes free with the first of those that run on its replica; until it is done itself, they all may be.
    # In the middle: now and then the machine stands still, and what is told afterwards is told at once. Starved, the
    # first one would take all that are left, and the burst be over.
    assert statistics.median(meanwhile) <= 3 * REPLICAS * MAX_RUNNING, meanwhile
    assert set(statuses) <= {200, 429}


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
                good.append(await asyncio.to_thread(key_writing.rotate, guarded.keys, "rotated", timedelta(minutes=5)))
                await asyncio.sleep(0.5)
            stop.set()

        await asyncio.gather(rotate(), *(load(number) for number in range(6)))
        assert set(statuses) == {200}
        key_writing.revoke(guarded.keys, "rotated")
        await asyncio.sleep(1.5)
        for secret in good[-2:]:
            refused = await client.post(PATH, json=completion(), headers={"authorization": f"Bearer {secret}"})
            assert code(refused) == (401, "invalid_api_key")


async def test_ten_thousand_connections_opened_and_dropped_leave_nothing_behind(guarded: Guarded) -> None:
    secret, (host, _, port) = guarded.key("passing"), guarded.server.url.removeprefix("http://").partition(":")
    body = json.dumps(completion(tokens=20)).encode()
    head = f"POST {PATH} HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {secret}\r\ncontent-length: {len(body)}\r\n\r\n"
    sent = (b"", head.encode() + body[:-5], head.encode() + body)

    def come_and_go() -> None:
        for number in range(CONNECTIONS):
            with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=30) as connection:
                connection.sendall(sent[number % 20 if number % 20 < 3 else number % 2])

    def descriptors() -> int:
        return sum(process.num_fds() for process in guarded.processes())

    async with guarded.client(secret) as client:
        await asyncio.gather(*(client.post(PATH, json=completion(tokens=1)) for _ in range(20)))
    before = descriptors()

    await asyncio.to_thread(come_and_go)

    await until(lambda: total(guarded, 0))

    async def as_before() -> bool:
        return descriptors() <= before + REPLICAS  # a connection of the proxy that is kept for the next request

    await until(as_before)
    async with guarded.client(guarded.key("after")) as client:
        assert (await client.post(PATH, json=completion(tokens=1))).status_code == 200


async def test_no_key_is_in_any_log(guarded: Guarded) -> None:
    """Of Ray, Serve, the replicas, vLLM and HAProxy; run after the other tests had their keys used."""
    server = psutil.Process(StateDir(guarded.server.state).running_server().pid)
    arguments = [argument for it in server.children(recursive=True) for argument in it.cmdline()]
    homes = {home for argument in arguments for home in re.findall(r"(/[^=:\s]*/graft-[^/]+/ray)/", argument)}
    logs = [Path(home) / "session_latest" / "logs" for home in homes]
    assert any("EngineReplica" in it.name for log in logs for it in log.rglob("*")), "where replicas write"
    unknown = "graft-" + "x" * 43
    async with guarded.client(unknown) as client:
        assert (await client.post(PATH, json=completion())).status_code == 401
    await asyncio.sleep(1)

    searched = [*map(str, logs), str(guarded.server.state)]
    for secret in (*guarded.secrets.values(), unknown):
        assert await asyncio.to_thread(files_with, secret, searched) == ""


def files_with(text: str, places: list[str]) -> str:
    return subprocess.run(["grep", "-rlF", text, *places], check=False, capture_output=True, text=True).stdout


async def test_a_killed_replica_gives_the_concurrent_requests_of_its_callers_back(guarded: Guarded) -> None:
    async with (
        guarded.client(guarded.key("four", concurrent_requests=4)) as client,
        contextlib.AsyncExitStack() as stack,
    ):
        for _ in range(4):
            response = await stack.enter_async_context(stream(client, for_long(n=16)))
            assert response.status_code == 200
        assert code(await client.post(PATH, json=completion(tokens=1))) == (429, "rate_limit_exceeded")

        for process in guarded.processes():
            process.send_signal(signal.SIGKILL)
        killed_s = time.monotonic()
        with contextlib.suppress(httpx.HTTPError):
            await stack.aclose()

    async with guarded.client(guarded.secrets["four"]) as client:

        async def answers() -> bool:
            with contextlib.suppress(httpx.HTTPError):
                return (await client.post(PATH, json=completion(tokens=1))).status_code == 200
            return False

        await until(answers, 240)
        await asyncio.sleep(max(0.0, killed_s + LEASE_S + 1 - time.monotonic()))
        at_once = await asyncio.gather(*(client.post(PATH, json=completion(tokens=100)) for _ in range(4)))
        assert {it.status_code for it in at_once} == {200}, "all four are free"


async def test_streams_finish_while_the_server_stops_and_new_requests_are_refused(guarded: Guarded) -> None:
    """The last one: it stops the server."""

    async def replicas_are_back() -> bool:
        return len(await guarded.running()) == REPLICAS

    await until(replicas_are_back, 240)
    pid = StateDir(guarded.server.state).running_server().pid
    async with guarded.client(guarded.key("patient")) as client:

        async def read_on(started: asyncio.Event) -> str:
            async with stream(client, completion(tokens=400)) as response:
                told = ""
                async for text in response.aiter_text():
                    started.set()
                    told += text
                return told

        begun = [asyncio.Event() for _ in range(2 * REPLICAS)]
        streams = [asyncio.create_task(read_on(it)) for it in begun]
        for it in begun:
            await it.wait()

        os.kill(pid, signal.SIGTERM)

        for told in await asyncio.gather(*streams):
            assert told.endswith("data: [DONE]\n\n")
        await until(lambda: gone(client))


async def gone(client: httpx.AsyncClient) -> Any:
    try:
        await client.get("/health")
    except httpx.HTTPError:
        return True
    return False
