"""What the engine gets of a request, and what its caller is told when the engine or the caller goes."""

from __future__ import annotations

import asyncio
import contextlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.types import Message, Receive, Scope, Send

from serve.gateway import Gateway
from serve.store import AdapterStore
from tests.serve.fakes import FakeEngine, respond
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

    assert [it["type"] for it in sent] == ["http.response.start"]
    assert "request failed" in caplog.text


@pytest.fixture
def ends_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process, which by rights ends before it says anything for a dead engine."""
    monkeypatch.setattr("serve.engine_call._SILENCE_S", 0.01)


@pytest.mark.usefixtures("ends_late")
async def test_a_dead_engine_answers_503_so_that_the_proxy_tries_another_replica(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    engine.is_dead = True

    for response in (await client.post("/v1/completions", json={"model": "pirate"}), await client.get("/health")):
        assert response.status_code == 503
        assert response.headers["retry-after"] == "1"
        assert response.json()["error"]["code"] == "engine_unavailable"


@pytest.mark.usefixtures("ends_late")
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
    assert (await client.get("/health")).status_code == 503, "whoever watches is told at once"
    for task in (under_way, late):
        task.cancel()


async def test_a_cancelled_request_reaches_the_engine_as_a_disconnect(gateway: Gateway, engine: FakeEngine) -> None:
    started, told = asyncio.Event(), asyncio.Event()

    async def generate(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        started.set()
        assert await receive() == {"type": "http.disconnect"}
        told.set()

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

    assert told.is_set()


@pytest.mark.parametrize(("told", "ended"), [(b"", asyncio.CancelledError), (b"whole", None)], ids=["before", "after"])
async def test_a_caller_that_the_engine_sees_leave_before_it_has_its_answer_was_not_answered(
    gateway: Gateway, engine: FakeEngine, told: bytes, ended: type[BaseException] | None
) -> None:
    async def generate(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if told:
            await send({"type": "http.response.body", "body": told})
        assert await receive() == {"type": "http.disconnect"}

    messages = [{"type": "http.request", "body": b'{"model": "pirate"}'}, {"type": "http.disconnect"}]

    async def receive() -> Message:
        return messages.pop(0)

    async def send(_: Message) -> None: ...

    engine.handler = generate
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b""}
    with pytest.raises(ended) if ended else contextlib.nullcontext():
        await gateway(scope, receive, send)


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

    async with asyncio.timeout(5):
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
        await respond(send, 200, json.dumps([model, sorted(it.engine_name for it in engine.resident)]).encode())

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


@pytest.mark.parametrize(
    ("asked", "refused"),
    [
        ({"prompt_logprobs": 0}, True),
        ({"prompt_logprobs": None}, False),
        ({"echo": True, "logprobs": 1}, True),
        ({"echo": 1, "logprobs": 0}, True),
        ({"echo": True, "top_logprobs": 2}, True),
        ({"echo": True}, False),
        ({"echo": True, "messages": [{"role": "user", "content": "x"}]}, True),
        ({"echo": "yes", "messages": [], "top_logprobs": None}, True),
        ({"echo": False, "messages": [{"role": "user", "content": "x"}]}, False),
        ({"echo": True, "logprobs": False}, True),
        ({"echo": True, "logprobs": None}, False),
        ({"echo": False, "logprobs": 5}, False),
        ({"logprobs": True, "top_logprobs": 2}, False),
    ],
)
@pytest.mark.parametrize("model", ["small-llama", "pirate"])
async def test_what_would_stop_an_engine_with_adapters_never_reaches_it(
    client: httpx.AsyncClient, engine: FakeEngine, asked: dict[str, object], refused: bool, model: str
) -> None:
    for gives, status in ((False, 400 if refused else 200), (True, 200)):
        engine.gives_prompt_logprobs = gives

        answer = await client.post("/v1/completions", json={"model": model, "prompt": "x", **asked})

        assert answer.status_code == status
        if status == 400:
            assert answer.json()["error"]["code"] == "prompt_logprobs_unavailable"
