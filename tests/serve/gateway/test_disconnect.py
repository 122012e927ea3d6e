"""What the engine sees of a client that disconnects, and when."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from starlette.types import Message, Receive, Scope, Send

from serve.gateway.app import Gateway
from serve.gateway.disconnect import DisconnectWatcher
from serve.gateway.response import ResponsePipeline
from serve.observability.request_record import RequestRecord
from tests.serve.fakes import FakeEngine

# As Ray Serve's proxy forwards it: Ray Serve itself doesn't watch for a disconnect then.
WATCHED: Scope = {"type": "http", "headers": [(b"x-request-disconnect-disabled", b"?1")]}


async def test_a_caller_that_has_all_of_its_answer_has_not_left() -> None:
    """Whoever answers, the engine or another replica: uvicorn tells the end of an answer as a disconnect."""
    whole = asyncio.Event()

    async def receive() -> Message:
        await whole.wait()
        return {"type": "http.disconnect"}

    async def send(_: Message) -> None:
        whole.set()

    client, record = DisconnectWatcher(receive), RequestRecord("", "/v1/completions")
    with client.watch(WATCHED):
        await asyncio.sleep(0.1)  # it is watched by now
        await ResponsePipeline(send, record, client).send({"type": "http.response.body", "body": b"all"})
        await asyncio.sleep(0.05)

    assert not client.is_disconnected


async def test_a_cancelled_request_reaches_the_engine_as_a_disconnect(gateway: Gateway, engine: FakeEngine) -> None:
    started, disconnected = asyncio.Event(), asyncio.Event()

    async def generate(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        started.set()
        assert await receive() == {"type": "http.disconnect"}
        disconnected.set()

    body = [{"type": "http.request", "body": b'{"model": "pirate"}'}]

    async def receive() -> Message:
        if body:
            return body.pop()
        await asyncio.Event().wait()
        raise AssertionError

    async def send(_: Message) -> None: ...

    engine.handler = generate
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b""}
    request = asyncio.create_task(gateway(scope, receive, send))
    await started.wait()
    request.cancel()
    await asyncio.gather(request, return_exceptions=True)

    assert disconnected.is_set()


@pytest.mark.parametrize(("body", "ended"), [(b"", asyncio.CancelledError), (b"whole", None)], ids=["before", "after"])
async def test_a_caller_that_the_engine_sees_leave_before_it_has_its_answer_was_not_answered(
    gateway: Gateway, engine: FakeEngine, body: bytes, ended: type[BaseException] | None
) -> None:
    async def generate(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if body:
            await send({"type": "http.response.body", "body": body})
        assert await receive() == {"type": "http.disconnect"}

    messages = [{"type": "http.request", "body": b'{"model": "pirate"}'}, {"type": "http.disconnect"}]

    async def receive() -> Message:
        return messages.pop(0)

    async def send(_: Message) -> None: ...

    engine.handler = generate
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b""}
    with pytest.raises(ended) if ended else contextlib.nullcontext():
        await gateway(scope, receive, send)
