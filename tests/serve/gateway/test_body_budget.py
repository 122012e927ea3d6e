"""The memory for request bodies: on real connections to a real uvicorn, and the turns of what waits for it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random

import pydantic
import pytest
from starlette.types import Receive, Scope, Send

from serve.errors import BodyBudgetFull
from serve.gateway.body import BodyBudget
from serve.settings import GatewaySettings
from tests.serve.connections import BODY, Server, Started, start
from tests.serve.fakes import FakeEngine, respond
from tests.serve.guarded import ADMIN_TOKEN, generate, until

__all__ = ["start"]  # a fixture

MIB = 1 << 20
SMALL = 256 << 10
LIMITS = {"max_body_bytes": MIB, "body_memory_bytes": 2 * MIB}


def padded(size_bytes: int) -> bytes:
    """A request of this size."""
    body = json.loads(BODY)
    padding = size_bytes - len(json.dumps(body | {"user": ""}))
    return json.dumps(body | {"user": "x" * padding}).encode()


def chunked(server: Server) -> bytes:
    head = server.request(b"", length=0)
    return head.replace(b"content-length: 0", b"transfer-encoding: chunked")


def admin_call(length: int) -> bytes:
    return (
        f"POST /admin/v1/adapters HTTP/1.1\r\nhost: graft\r\nauthorization: Bearer {ADMIN_TOKEN}\r\n"
        f"content-length: {length}\r\n\r\n"
    ).encode()


async def answer_of(reader: asyncio.StreamReader) -> tuple[bytes, dict[str, str], str]:
    """Status, headers and code of a response that is an error."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in head[1:] if line)
    content = json.loads(await reader.readexactly(int(headers["content-length"])))
    return head[0].split()[1].encode(), headers, content["error"]["code"]


async def test_bodies_that_are_announced_hold_no_more_than_the_budget_and_small_ones_have_room(
    start: Started, engine: FakeEngine
) -> None:
    engine.handler = generate
    async with start(**LIMITS) as server, contextlib.AsyncExitStack() as stack:
        bodies = server.guarded.gateway.policy.bodies
        connections = [await stack.enter_async_context(server.connection()) for _ in range(8)]
        for _, writer in connections:
            writer.write(server.request(BODY[:5], length=MIB))  # the rest does not come
        await until(lambda: bodies.held_bytes == MIB)
        small, small_writer = await stack.enter_async_context(server.connection())
        small_writer.write(server.request(padded(SMALL)))

        assert (await small.readline()).startswith(b"HTTP/1.1 200"), "while all the others wait or arrive"
        answers = [asyncio.create_task(answer_of(reader)) for reader, _ in connections]
        await until(lambda: sum(answer.done() for answer in answers) == 7)

        assert bodies.held_bytes == MIB
        for answer in answers:
            if answer.done():
                status, headers, code = answer.result()
                assert (status, code, headers["retry-after"]) == (b"503", "body_budget_full", "1")
            answer.cancel()
        await stack.aclose()
        await until(lambda: bodies.held_bytes == 0)


async def test_a_body_without_a_length_is_charged_as_it_comes(start: Started, engine: FakeEngine) -> None:
    engine.handler = generate
    async with start(**LIMITS) as server, server.connection() as (first, first_writer):
        bodies = server.guarded.gateway.policy.bodies
        part = BODY[:5] + b" " * 50_000
        for number in range(1, 21):
            first_writer.write((chunked(server) if number == 1 else b"") + b"%x\r\n%b\r\n" % (len(part), part))
            await until(lambda number=number: bodies.held_bytes == number * len(part))  # type: ignore[misc]

        async with server.connection() as (second, second_writer):
            second_writer.write(chunked(server) + b"%x\r\n%b\r\n" % (600_000, bytes(600_000)))
            status, _, code = await answer_of(second)
            assert (status, code) == (b"503", "body_budget_full")
        await until(lambda: bodies.held_bytes == 20 * len(part))

        first_writer.write(b"%x\r\n%b\r\n" % (60_000, bytes(60_000)))
        assert (await answer_of(first))[::2] == (b"413", "body_too_large")
        await until(lambda: bodies.held_bytes == 0)


async def test_a_body_that_is_announced_as_too_large_is_refused_before_it_is_sent(
    start: Started, engine: FakeEngine
) -> None:
    async with start(**LIMITS) as server, server.connection() as (reader, writer):
        writer.write(server.request(b"", length=MIB + 1))

        assert (await answer_of(reader))[::2] == (b"413", "body_too_large")


async def test_a_body_is_held_until_its_request_ends(start: Started, engine: FakeEngine) -> None:
    ended = asyncio.Event()

    async def wait(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await ended.wait()
        await respond(send, 200, b"{}")

    engine.handler = wait
    async with start(**LIMITS) as server, server.connection() as (reader, writer):
        bodies = server.guarded.gateway.policy.bodies
        writer.write(server.request(BODY))
        await until(lambda: server.guarded.gateway.policy.engine_queue.running == 1)
        assert bodies.held_bytes == len(BODY)

        ended.set()

        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        await until(lambda: bodies.held_bytes == 0)


@pytest.mark.parametrize(
    ("length", "status", "code"), [(1000, b"408", "body_too_slow"), (MIB + 1, b"413", "body_too_large")]
)
async def test_a_body_for_the_admin_api_has_the_same_limits(
    start: Started, length: int, status: bytes, code: str
) -> None:
    async with start(body_timeout_s=0.5, **LIMITS) as server, server.connection() as (reader, writer):
        writer.write(admin_call(length) + b"{")

        assert (await answer_of(reader))[::2] == (status, code)
        await until(lambda: server.guarded.gateway.policy.bodies.held_bytes == 0)


async def test_whoever_has_no_key_or_token_holds_nothing(start: Started) -> None:
    async with start(**LIMITS) as server:
        for call in (server.request(b"", length=MIB), admin_call(MIB)):
            async with server.connection() as (reader, writer):
                writer.write(call.replace(b"Bearer ", b"Bearer no"))
                assert (await answer_of(reader))[0] == b"401"
                assert server.guarded.gateway.policy.bodies.held_bytes == 0


def test_less_memory_than_two_of_the_largest_bodies_is_refused() -> None:
    with pytest.raises(pydantic.ValidationError, match="at least twice max_body_bytes: 2000"):
        GatewaySettings(max_body_bytes=1000, body_memory_bytes=1999, admin_tokens={})


# What follows has no connections.


@contextlib.asynccontextmanager
async def held(budget: BodyBudget, size_bytes: int):  # type: ignore[no-untyped-def]
    with budget.charge() as charge:
        await charge.raise_to(size_bytes)
        yield charge


@pytest.mark.virtual_time
async def test_a_large_body_that_waits_is_let_in_when_another_one_ends() -> None:
    budget = BodyBudget(4 * MIB)
    entered: list[str] = []

    async def enter(name: str, size_bytes: int) -> None:
        async with held(budget, size_bytes):
            entered.append(name)
            await asyncio.sleep(10)

    async with held(budget, 2 * MIB):
        waiting = [asyncio.create_task(enter(name, 2 * MIB)) for name in ("first", "second")]
        await asyncio.sleep(0.1)
        assert entered == []
        small = asyncio.create_task(enter("small", SMALL))
        await asyncio.sleep(0.1)
        assert entered == ["small"], "it passes those that wait"
    await asyncio.sleep(0.1)
    assert entered == ["small", "first"]
    with pytest.raises(BodyBudgetFull):
        await waiting[1]
    await asyncio.gather(waiting[0], small)
    assert budget.held_bytes == 0


@pytest.mark.virtual_time
async def test_a_body_waits_for_those_before_it_until_they_leave() -> None:
    budget = BodyBudget(4 * MIB)
    entered = asyncio.Event()

    async def enter(size_bytes: int) -> None:
        async with held(budget, size_bytes):
            entered.set()

    async with held(budget, 2 * MIB):
        first = asyncio.create_task(enter(2 * MIB))
        await asyncio.sleep(0.1)
        second = asyncio.create_task(enter(MIB))
        await asyncio.sleep(0.1)
        assert not entered.is_set(), "it would fit, but not the one before it then"

        first.cancel()
        await asyncio.sleep(0.1)

        assert entered.is_set()
    await second


@pytest.mark.virtual_time
@pytest.mark.parametrize("seed", range(20))
async def test_no_order_of_arrivals_ends_and_cancellations_passes_the_limit_or_loses_a_byte(seed: int) -> None:
    order = random.Random(seed)
    budget, most = BodyBudget(4 * MIB), 0

    async def request() -> None:
        nonlocal most
        await asyncio.sleep(order.random())
        with contextlib.suppress(BodyBudgetFull):
            async with held(budget, order.choice([1, SMALL, MIB])) as charge:
                most = max(most, budget.held_bytes)
                await asyncio.sleep(order.choice([0, 0.1, 0.5]))
                await charge.raise_to(order.choice([SMALL, MIB, 2 * MIB]))
                most = max(most, budget.held_bytes)

    requests = [asyncio.create_task(request()) for _ in range(60)]
    for task in order.sample(requests, 20):
        asyncio.get_running_loop().call_later(order.choice([0.5, 0.6, 1.0, order.random()]), task.cancel)
    await asyncio.gather(*requests, return_exceptions=True)

    assert MIB < most <= budget.limit_bytes
    assert budget.held_bytes == 0
    assert {task.exception() for task in requests if not task.cancelled()} == {None}
