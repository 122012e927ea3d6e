"""Callers that dawdle, leave or come by the thousands, on real connections to a real uvicorn."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field

import psutil
from starlette.types import Receive, Scope, Send

from tests.serve.connections import BODY, Started, start
from tests.serve.fakes import FakeEngine
from tests.serve.guarded import generate, until

__all__ = ["start"]  # a fixture


@dataclass
class Stream:
    """An engine that streams without end until its caller disconnects."""

    running: int = 0
    received: list[str] = field(default_factory=list)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        self.running += 1
        gone = asyncio.ensure_future(receive())
        try:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            while not gone.done():
                await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
                await asyncio.sleep(0)
            self.received.append(gone.result()["type"])
        finally:
            gone.cancel()
            self.running -= 1


async def test_a_caller_that_takes_nothing_of_its_answer_is_dropped_and_all_that_it_held_is_free(
    start: Started, engine: FakeEngine
) -> None:
    engine.handler = stream = Stream()
    async with start(send_timeout_s=0.5) as server, server.connection() as (_, writer):
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(server.request(BODY))
        await until(lambda: stream.running == 1)

        await until(lambda: stream.running == 0)

        await until(server.is_idle)
        assert server.guarded.gateway.policy.slow_clients.dropped == 1


async def test_a_slow_reader_that_goes_on_reading_is_left_alone(start: Started, engine: FakeEngine) -> None:
    engine.handler = stream = Stream()
    async with start(send_timeout_s=2) as server, server.connection() as (reader, writer):
        writer.write(server.request(BODY))
        for _ in range(30):  # longer than the timeout, and slower than the engine
            await reader.readexactly(1 << 19)
            await asyncio.sleep(0.1)
        assert stream.running == 1
        assert server.guarded.gateway.policy.slow_clients.dropped == 0


async def test_a_caller_that_leaves_a_stream_stops_it_and_frees_what_it_held(
    start: Started, engine: FakeEngine
) -> None:
    engine.handler = stream = Stream()
    async with start() as server:
        async with server.connection() as (reader, writer):
            writer.write(server.request(BODY))
            assert await reader.read(100)
            assert not server.is_idle()
        await until(server.is_idle)
        assert stream.received == ["http.disconnect"]


async def test_a_caller_that_leaves_while_it_waits_leaves_the_queue(start: Started, engine: FakeEngine) -> None:
    engine.handler = stream = Stream()
    async with start(max_running_requests=1) as server, server.connection() as (reader, writer):
        writer.write(server.request(BODY))
        assert await reader.read(100)
        engine_queue = server.guarded.gateway.policy.engine_queue
        async with server.connection() as (_, waiting):
            waiting.write(server.request(BODY))
            await until(lambda: engine_queue.waiting == 1)
            await asyncio.sleep(0.1)
            assert engine_queue.waiting == 1

        await until(lambda: engine_queue.waiting == 0)

        assert (engine_queue.running, stream.running) == (1, 1), "the one before it has its place"


async def test_a_body_that_does_not_arrive_holds_nothing_and_is_reported(start: Started, engine: FakeEngine) -> None:
    engine.handler = generate
    async with start(body_timeout_s=3, max_running_requests=1) as server:
        async with server.connection() as (slow, slow_writer), server.connection() as (quick, quick_writer):
            slow_writer.write(server.request(BODY[:5], length=1000))
            quick_writer.write(server.request(BODY))
            assert (await quick.readline()).startswith(b"HTTP/1.1 200"), "though the other one was first"

            answer = await slow.read()

            assert answer.startswith(b"HTTP/1.1 408")
            assert b'"code":"body_too_slow"' in answer, "and then the connection is closed"
        assert server.is_idle()


async def test_a_queue_that_is_full_says_so_while_the_engine_is_busy(start: Started, engine: FakeEngine) -> None:
    engine.handler = Stream()
    async with start(max_running_requests=1, max_waiting_requests=2) as server, contextlib.AsyncExitStack() as stack:
        for _ in range(3):
            _, writer = await stack.enter_async_context(server.connection())
            writer.write(server.request(BODY))
        await until(lambda: server.guarded.gateway.policy.engine_queue.waiting == 2)

        reader, writer = await stack.enter_async_context(server.connection())
        writer.write(server.request(BODY))
        answer = await reader.readuntil(b"\r\n\r\n")

        assert answer.startswith(b"HTTP/1.1 503")
        assert b"retry-after: " in answer


async def test_thousands_of_connections_opened_and_dropped_leave_nothing_behind(
    start: Started, engine: FakeEngine
) -> None:
    engine.handler = stream = Stream()
    this = psutil.Process()
    async with start(max_running_requests=20, max_waiting_requests=20) as server:

        async def come_and_go(number: int) -> None:
            with contextlib.suppress(ConnectionError):
                async with server.connection() as (reader, writer):
                    if number % 3:  # a third sends nothing, a third half a request, and a third a whole one
                        writer.write(server.request(BODY)[: None if number % 3 == 1 else -5])
                        await writer.drain()
                    if number % 7 == 0:
                        await reader.read(100)

        async def batch(numbers: range) -> None:
            await asyncio.gather(*(come_and_go(number) for number in numbers if number % 7 or number % 3 == 1))

        await batch(range(100))
        await until(server.is_idle)
        descriptors, tasks = this.num_fds(), len(asyncio.all_tasks())

        for first in range(0, 2_000, 200):
            await batch(range(first, first + 200))

        await until(server.is_idle)
        await until(lambda: this.num_fds() <= descriptors)
        await until(lambda: len(asyncio.all_tasks()) <= tasks)
        assert stream.running == 0
        assert server.guarded.gateway.policy.engine_queue.waiting == 0
