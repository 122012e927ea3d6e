"""A replica forwards a request to one that is silent, breaks off, or has another catalogue: both are real servers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import httpx
import openai
import pytest
from starlette.types import Receive, Scope, Send

from serve.catalogue.adapter_store import AdapterStore
from serve.gateway.routing import forwarding
from tests.serve.conftest import candidate
from tests.serve.fleet import ADAPTERS, FIRST, Fleet, Replica, fill, fleet_of_two

NEXT = candidate("adapter-0", "the next weights")
STREAM = [(b"content-type", b"text/event-stream; charset=utf-8")]
Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@pytest.fixture
async def fleet(store: AdapterStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Fleet]:
    """The second replica holds adapter-0. The first one would have to evict another adapter for it, so it forwards."""
    monkeypatch.setattr(forwarding, "GRACE_S", 0.2)
    async with fleet_of_two(store, tmp_path, max_wait_s=2, max_run_s=2) as fleet:
        here, there = fleet.replicas
        await fill(there, "adapter-0")
        await fill(here, "adapter-2", "adapter-3")
        yield fleet


@contextlib.asynccontextmanager
async def instead_of(holder: Replica, answer: Answer) -> AsyncIterator[None]:
    """Requests that are forwarded to the holder get there."""
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    holder.peers.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server:
        yield


async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while await reader.read(1024):
            pass
    writer.close()


def say(*chunks: bytes, kind: str = "text/event-stream", then: Answer) -> Answer:
    """An answer that begins with these chunks."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(re.findall(rb"(?i)content-length: (\d+)", head)[0]))
        writer.write(f"HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\ntransfer-encoding: chunked\r\n\r\n".encode())
        for chunk in chunks:
            writer.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
        await writer.drain()
        await then(reader, writer)

    return answer


async def break_off(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.close()


def chunk_of(text: str) -> bytes:
    choice = {"index": 0, "text": text, "finish_reason": None, "logprobs": None}
    content = {"id": "cmpl-1", "object": "text_completion", "created": 0, "model": "adapter-0", "choices": [choice]}
    return f"data: {json.dumps(content)}\n\n".encode()


async def test_a_holder_that_says_nothing_is_given_up_after_the_longest_time_that_a_request_may_take(
    fleet: Fleet,
) -> None:
    here, there = fleet.replicas
    async with instead_of(there, say_nothing):
        response = await here.response("adapter-0")

    assert response.status_code == 504
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("timeout", "holder_timeout")
    assert "sent nothing for 6.2 s" in error["message"], "two waits of 2 s, a run of 2 s, and 0.2 s more"
    assert here.engine.resident == {ADAPTERS[2].adapter, ADAPTERS[3].adapter}, "nothing was evicted for it"


@pytest.mark.parametrize(
    ("then", "code", "cut_off"),
    [
        (say_nothing, "holder_timeout", b""),
        (break_off, "holder_lost", b""),
        (break_off, "holder_lost", b'data: {"id": "cmpl-1", "cho'),
    ],
    ids=["silent", "broken off", "broken off inside an event"],
)
async def test_a_stream_that_its_holder_leaves_ends_with_an_error(
    fleet: Fleet, then: Answer, code: str, cut_off: bytes
) -> None:
    here, there = fleet.replicas
    chunks = [chunk for chunk in (chunk_of("Ahoy"), cut_off) if chunk]
    async with instead_of(there, say(*chunks, then=then)):
        response = await here.response("adapter-0")

    assert response.status_code == 200
    first, *between, error, done, end = response.text.split("\n\n")
    assert f"{first}\n\n".encode() == chunk_of("Ahoy")
    assert "".join(between).encode() == cut_off, "it stands alone, so that the error can be read"
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == code
    assert (done, end) == ("data: [DONE]", "")


async def test_the_official_client_raises_the_error_of_a_stream_that_its_holder_left(fleet: Fleet) -> None:
    here, there = fleet.replicas
    client = openai.AsyncOpenAI(base_url=f"{here.url}/v1", api_key="none", max_retries=0)
    async with instead_of(there, say(chunk_of("Ahoy"), then=break_off)), client:
        stream = await client.completions.create(model="adapter-0", prompt="hi", stream=True)

        assert (await anext(stream)).choices[0].text == "Ahoy"
        with pytest.raises(openai.APIError, match="ended before its response was complete"):
            await anext(stream)


async def test_an_event_of_messages_has_the_shape_of_anthropic(fleet: Fleet) -> None:
    here, there = fleet.replicas
    async with instead_of(there, say(b"event: ping\ndata: {}\n\n", then=break_off)):
        response = await here.response("adapter-0", "/v1/messages")

    kind, data = response.text.split("\n\n")[1].splitlines()
    assert kind == "event: error"
    error = json.loads(data.removeprefix("data: "))
    assert (error["type"], error["error"]["code"]) == ("error", "holder_lost")


async def test_an_answer_that_is_no_stream_is_broken_off_and_not_completed(fleet: Fleet) -> None:
    here, there = fleet.replicas
    async with instead_of(there, say(b'{"choices":', kind="application/json", then=break_off)):
        with pytest.raises(httpx.RemoteProtocolError):
            await here.response("adapter-0")


async def test_a_holder_that_pauses_for_less_than_a_run_may_take_is_waited_for(fleet: Fleet) -> None:
    here, there = fleet.replicas

    async def stream(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": STREAM})
        for text in ("Ahoy", "matey"):
            await asyncio.sleep(0.2)
            await send({"type": "http.response.body", "body": chunk_of(text), "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    there.engine.handler = stream
    response = await here.response("adapter-0")

    assert response.text == (chunk_of("Ahoy") + chunk_of("matey") + b"data: [DONE]\n\n").decode()
    assert here.peers.forwarded == 1


async def changed_there(fleet: Fleet, change: Callable[[], object]) -> None:
    """The catalogue is changed, and only the second replica has followed. Reports of before are known here."""
    _, there = fleet.replicas
    fleet.earlier_reports = await fleet.report()
    change()
    await there.reconciler.sync()


async def test_a_model_that_moved_is_answered_by_its_new_revision_though_only_the_holder_knew(fleet: Fleet) -> None:
    here, there = fleet.replicas

    def publish_anew() -> None:
        fleet.log.retire("adapter-0")
        fleet.log.stage(NEXT)
        fleet.log.promote(NEXT)

    await changed_there(fleet, publish_anew)
    assert here.reconciler.catalogue.epoch < there.reconciler.catalogue.epoch

    assert NEXT.adapter.engine_name in await here.ask("adapter-0")
    assert here.reconciler.catalogue.epoch == there.reconciler.catalogue.epoch


async def test_a_model_that_was_removed_is_unknown_by_the_newest_catalogue(fleet: Fleet) -> None:
    here, there = fleet.replicas
    await changed_there(fleet, lambda: fleet.log.retire("adapter-0"))

    response = await here.response("adapter-0")

    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
    assert "`adapter-0` does not exist" in response.json()["error"]["message"], "as the caller wrote it"
    assert "x-graft-epoch" not in response.headers
    assert here.reconciler.catalogue.epoch == there.reconciler.catalogue.epoch


async def test_many_requests_for_a_model_that_moved_read_the_catalogue_once(fleet: Fleet) -> None:
    here, _ = fleet.replicas
    follow, reads = here.reconciler.follow, 0

    async def counting() -> None:
        nonlocal reads
        reads += 1
        await follow()

    here.peers.follow = counting
    await changed_there(fleet, lambda: fleet.log.retire("adapter-0"))

    responses = await asyncio.gather(*(here.response("adapter-0") for _ in range(20)))

    assert {response.status_code for response in responses} == {404}
    assert reads == 1


async def test_a_catalogue_that_can_not_be_read_is_no_reason_to_say_that_a_model_is_unknown(
    fleet: Fleet, tmp_path: Path
) -> None:
    here, _ = fleet.replicas
    await changed_there(fleet, lambda: fleet.log.retire("adapter-0"))
    entry = max((tmp_path / "catalogue").iterdir())
    entry.rename(tmp_path / "away")

    response = await here.response("adapter-0")

    assert (response.status_code, response.json()["error"]["code"]) == (503, "catalogue_behind")
    assert response.headers["retry-after"] == "1"
    (tmp_path / "away").rename(entry)
    assert (await here.response("adapter-0")).status_code == 404


async def test_what_the_holder_does_not_know_yet_is_answered_here(fleet: Fleet) -> None:
    here, there = fleet.replicas
    fleet.log.retire("adapter-0")
    there.reconciler.catalogue = fleet.log.read()  # and not what follows, while its engine still holds the revision
    fleet.log.stage(FIRST)
    fleet.log.promote(FIRST)
    await here.reconciler.follow()

    assert (await here.ask("adapter-0")).startswith(f"replica 0, {FIRST.adapter.engine_name}")
