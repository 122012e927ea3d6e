"""What the engine gets of a request, and what the caller gets for it, also when the engine dies."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.types import Message, Receive, Scope, Send

from serve.catalogue.adapter_store import AdapterStore
from serve.gateway.app import Gateway
from tests.serve.fakes import FakeEngine, Handler, respond
from tests.serve.one_replica import ADMIN, NEW, OLD, gateway_of


async def seen_by_engine(client: httpx.AsyncClient, body: str, path: str = "/v1/completions") -> dict[str, Any]:
    response = await client.post(path, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def test_an_alias_reaches_the_engine_as_the_revision_it_stands_for(client: httpx.AsyncClient) -> None:
    seen = await seen_by_engine(client, '{"model": "pirate", "prompt": "hi"}')

    assert json.loads(seen["body"]) == {"model": OLD.adapter.engine_name, "prompt": "hi"}
    assert int(seen["headers"]["content-length"]) == len(seen["body"])


async def test_everything_but_the_model_reaches_the_engine_byte_for_byte(client: httpx.AsyncClient) -> None:
    rest = r'{"logit_bias":{"1":1e-7},"seed":12345678901234567890,"prompt":"\u00e9\ud83d\ude00","x":1.10}'

    seen = await seen_by_engine(client, '{"model":"pirate",' + rest[1:])

    assert seen["body"] == '{"model":"' + OLD.adapter.engine_name + '",' + rest[1:]


@pytest.mark.parametrize("body", ['{"model": "small-llama", "prompt": "hi"}', '{"prompt":  "hi"}', '{"model":null}'])
async def test_a_request_for_the_base_model_is_passed_on_untouched(client: httpx.AsyncClient, body: str) -> None:
    response = await client.post("/v1/completions", content=body)
    assert response.headers["x-graft-model"] == "small-llama"
    assert (await seen_by_engine(client, body))["body"] == body


async def test_a_bug_is_answered_without_its_cause(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    async def broken(*_: object) -> None:
        raise RuntimeError("secret detail")

    engine.handler = broken
    response = await client.post("/v1/completions", json={"model": "pirate"})

    assert response.status_code == 500
    assert response.json()["error"]["code"] == "server_error"
    assert "secret detail" not in response.text


async def test_a_bug_in_the_middle_of_an_answer_is_logged_and_ends_the_connection(
    gateway: Gateway, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError("a bug")

    engine.handler = fail
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b'{"model": "pirate"}'}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b""}
    with pytest.raises(RuntimeError, match="a bug"):
        await gateway(scope, receive, send)

    assert [message["type"] for message in sent] == ["http.response.start"]
    assert "request failed" in caplog.text


@pytest.fixture
def exits_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replica that still runs when it should have exited after the death of its engine."""
    monkeypatch.setattr("serve.gateway.response._REPLICA_EXIT_S", 0.01)


@pytest.mark.usefixtures("exits_late")
async def test_a_dead_engine_answers_503_so_that_the_proxy_tries_another_replica(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.is_dead = True

    for response in (await client.post("/v1/completions", json={"model": "pirate"}), await client.get("/health")):
        assert response.status_code == 503
        assert response.headers["retry-after"] == "1"
        assert response.json()["error"]["code"] == "engine_unavailable"


@pytest.mark.usefixtures("exits_late")
@pytest.mark.parametrize(("path", "shape"), [("/v1/completions", None), ("/v1/messages", "error")])
async def test_an_engine_that_dies_under_a_request_turns_its_500_into_a_503(
    client: httpx.AsyncClient, engine: FakeEngine, path: str, shape: str | None
) -> None:
    async def die(scope: Scope, receive: Receive, send: Send) -> None:
        engine.is_dead = True
        await respond(send, 500, b'{"error": "EngineDeadError"}')

    engine.handler = die
    response = await client.post(path, json={"model": "pirate"})

    assert response.status_code == 503
    assert response.json().get("type") == shape
    assert response.json()["error"]["code"] == "engine_unavailable"


@pytest.mark.virtual_time
async def test_nothing_is_said_for_a_dead_engine_before_its_replica_ends(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    async def die(scope: Scope, receive: Receive, send: Send) -> None:
        engine.is_dead = True
        await respond(send, 500, b'{"error": "EngineDeadError"}')

    engine.handler = die
    under_way = asyncio.create_task(client.post("/v1/completions", json={"model": "pirate"}))
    await asyncio.sleep(0.1)
    late = asyncio.create_task(client.post("/v1/completions", json={"model": "pirate"}))
    await asyncio.sleep(0.1)

    assert engine.is_dead
    assert not under_way.done()
    assert not late.done()
    assert (await client.get("/health")).status_code == 503, "a probe sees it at once"
    for task in (under_way, late):
        task.cancel()


@pytest.mark.parametrize("model", ["small-llama", "pirate"])
async def test_the_next_request_of_a_caller_finds_the_place_of_the_one_before(
    engine: FakeEngine, store: AdapterStore, tmp_path: Path, model: str
) -> None:
    engine.max_running_requests = 1
    gateway = await gateway_of(engine, store, tmp_path)
    statuses: list[int] = []

    async def ask(requests: int) -> None:
        """The next one begins as soon as the last byte of the answer is there."""

        async def receive() -> Message:
            return {"type": "http.request", "body": json.dumps({"model": model}).encode()}

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])
            elif not message.get("more_body") and requests > 1:
                await ask(requests - 1)

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b""}
        await gateway(scope, receive, send)

    async with asyncio.timeout(60):
        await ask(3)

    assert statuses == [200, 200, 200]


async def test_a_request_keeps_the_revision_it_began_with_while_the_alias_moves(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    began, finish = asyncio.Event(), asyncio.Event()

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        model = json.loads((await receive())["body"])["model"]
        if model == OLD.adapter.engine_name:
            began.set()
            await finish.wait()
        await respond(
            send, 200, json.dumps([model, sorted(adapter.engine_name for adapter in engine.resident)]).encode()
        )

    engine.handler = slow
    before = asyncio.create_task(client.post("/v1/completions", json={"model": "pirate"}))
    await began.wait()
    published = await client.post("/admin/v1/adapters", json={"candidate": asdict(NEW)}, headers=ADMIN)
    after = await client.post("/v1/completions", json={"model": "pirate"})
    finish.set()

    both = sorted([OLD.adapter.engine_name, NEW.adapter.engine_name])
    assert published.status_code == 200, published.text
    assert after.json() == [NEW.adapter.engine_name, both]
    assert (await before).json() == [OLD.adapter.engine_name, both]
    assert after.headers["x-graft-model"] == NEW.adapter.engine_name
    assert (await before).headers["x-graft-model"] == OLD.adapter.engine_name


def endless(*chunks: bytes, kind: bytes = b"text/event-stream") -> Handler:
    """Answers with the chunks, and ends only when its client disconnects, as vLLM does."""

    async def handler(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        if chunks:
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
        for chunk in chunks:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        assert (await receive())["type"] == "http.disconnect"
        await send({"type": "http.response.body", "body": b"of an aborted request"})

    return handler


async def test_a_request_that_runs_too_long_is_aborted_and_answered_in_a_way_that_clients_do_not_retry(
    client: httpx.AsyncClient, gateway: Gateway, engine: FakeEngine
) -> None:
    gateway.policy.max_run_s = 0.05
    engine.handler = endless()

    response = await client.post("/v1/completions", json={"model": "pirate"})

    assert (response.status_code, response.json()["error"]["code"]) == (504, "run_too_long")
    assert response.headers["x-should-retry"] == "false"
    assert gateway.policy.engine_queue.running == 0


@pytest.mark.parametrize(
    ("path", "chunk", "end"),
    [
        ("/v1/completions", b"data: {}\n\n", "data: [DONE]\n\n"),
        ("/v1/messages", b"event: message_start\ndata: {}\n\n", ""),
        ("/v1/responses", b'event: response.created\ndata: {"sequence_number":6}\n\n', ""),
    ],
)
async def test_a_stream_that_runs_too_long_ends_with_an_event_in_the_form_of_its_route(
    client: httpx.AsyncClient, gateway: Gateway, engine: FakeEngine, path: str, chunk: bytes, end: str
) -> None:
    gateway.policy.max_run_s = 0.05
    engine.handler = endless(chunk, chunk)

    response = await client.post(path, json={"model": "pirate", "stream": True})

    assert response.status_code == 200
    begin = chunk.decode() * 2
    assert response.text.startswith(begin)
    assert response.text.endswith(end)
    kind, _, data = response.text.removeprefix(begin).removesuffix(end).rpartition("data: ")
    event = json.loads(data)
    assert kind == ("" if path == "/v1/completions" else "event: error\n")
    assert (event if path == "/v1/responses" else event["error"])["code"] == "run_too_long"
    assert event.get("sequence_number") == (7 if path == "/v1/responses" else None)
