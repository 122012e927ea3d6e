from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.types import Message, Receive, Scope, Send

from serve.admin import Admin
from serve.admission import Admission, objections
from serve.candidate import Candidate
from serve.config import EngineSettings, GatewaySettings, ServeSettings
from serve.errors import AdapterRejected
from serve.gateway import Gateway
from serve.log import CatalogueLog
from serve.objects import Directory
from serve.openai import ENGINE_ROUTES
from serve.publish import Control
from serve.reconcile import Reconciler, ReplicaReport
from serve.residency import AdapterPool
from serve.state import sha256
from serve.store import AdapterStore
from tests.serve.conftest import BASE, believe, candidate
from tests.serve.fakes import FakeEngine, respond

OLD, NEW = candidate("pirate", "old"), candidate("pirate", "new")
TOKEN = "the admin token"
ADMIN = {"authorization": f"Bearer {TOKEN}"}
MAX_BODY_BYTES = 1000


class OneReplica:
    def __init__(self, reconciler: Reconciler) -> None:
        self._reconciler = reconciler

    async def sync(self, awaited: str | None = None) -> Sequence[ReplicaReport]:
        return [await self._reconciler.sync(awaited)]


class Unchecked(Admission):
    """The files of these adapters are empty."""

    def check(self, candidate: Candidate, directory: Path) -> None:
        if found := objections(candidate, self._engine):
            raise AdapterRejected("; ".join(found))


@pytest.fixture
def log(tmp_path: Path) -> CatalogueLog:
    log = CatalogueLog(Directory(tmp_path))
    log.stage(OLD)
    log.promote(OLD)
    return log


MakeGateway = Callable[[], Awaitable[Gateway]]


@pytest.fixture
async def gateway(make_gateway: MakeGateway) -> Gateway:
    return await make_gateway()


@pytest.fixture
def make_gateway(engine: FakeEngine, log: CatalogueLog, store: AdapterStore, tmp_path: Path) -> MakeGateway:
    async def make() -> Gateway:
        return await gateway_of(engine, log, store, tmp_path)

    return make


class NamedOnly(AdapterStore):
    """A directory of the right name will do."""

    def _is_whole(self, path: Path) -> bool:
        return path.is_dir()


async def gateway_of(engine: FakeEngine, log: CatalogueLog, store: AdapterStore, tmp_path: Path) -> Gateway:
    settings = ServeSettings(
        engine=EngineSettings(model_path=tmp_path, model_name="small-llama", fingerprint=BASE, max_lora_rank=16),
        gateway=GatewaySettings(max_body_bytes=MAX_BODY_BYTES, admin_tokens={"admin": sha256(TOKEN)}),
        state_dir=tmp_path,
    )
    pool = AdapterPool(engine, store, capacity=2)
    reconciler = Reconciler("replica-1", log, engine, pool, believe)
    await reconciler.sync()
    (tmp_path / NEW.revision).mkdir()
    admin = Admin(
        settings.gateway.admin_tokens,
        settings.engine,
        settings.admission,
        Unchecked(settings.engine, settings.admission),
        NamedOnly(tmp_path, Directory(tmp_path)),
        Control(log, OneReplica(reconciler)),
    )
    return Gateway(settings, engine, pool, lambda: reconciler.catalogue, admin)


@pytest.fixture
async def client(gateway: Gateway) -> AsyncIterator[httpx.AsyncClient]:
    async with calling(gateway) as client:
        yield client


def calling(gateway: Gateway) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(gateway, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://graft")


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


@pytest.mark.parametrize("path", ENGINE_ROUTES)
async def test_every_public_route_reaches_the_engine(client: httpx.AsyncClient, path: str) -> None:
    assert (await seen_by_engine(client, '{"model": "pirate"}', path))["path"] == path


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/scale_elastic_ep"),
        ("POST", "/sleep"),
        ("POST", "/start_profile"),
        ("POST", "/invocations"),
        ("GET", "/metrics"),
        ("GET", "/docs"),
        ("POST", "/v1/completions/"),
        ("POST", "/v1/../scale_elastic_ep"),
        ("POST", "//v1/load_lora_adapter"),
    ],
)
async def test_no_other_route_of_the_engine_is_reachable(
    client: httpx.AsyncClient, engine: FakeEngine, method: str, path: str
) -> None:
    async def unreachable(*_: object) -> None:
        raise AssertionError("the engine was reached")

    engine.handler = unreachable
    response = await client.request(method, path, json={})

    assert response.status_code == 404
    assert response.json()["error"]["code"] == "route_not_found"


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        pytest.param(b'{"model": "nobody"}', 404, "model_not_found", id="unknown-name"),
        pytest.param(b'{"model": "pirate@000000000000"}', 404, "model_not_found", id="unknown-revision"),
        pytest.param(b'{"model": ""}', 404, "model_not_found", id="empty-name"),
        pytest.param(b'{"model": 3}', 400, "invalid_body", id="model-not-a-string"),
        pytest.param(b'{"model": "pirate"', 400, "invalid_body", id="cut-off"),
        pytest.param(b'["model"]', 400, "invalid_body", id="not-an-object"),
        pytest.param(b"", 400, "invalid_body", id="empty"),
        pytest.param(b'{"model": "\xff"}', 400, "invalid_body", id="not-utf-8"),
        pytest.param(b'{"prompt": "' + b"x" * MAX_BODY_BYTES + b'"}', 413, "body_too_large", id="too-large"),
    ],
)
async def test_a_bad_request_gets_an_openai_error(
    client: httpx.AsyncClient, body: bytes, status: int, code: str
) -> None:
    response = await client.post("/v1/chat/completions", content=body)

    assert response.status_code == status
    error = response.json()["error"]
    assert error["code"] == code
    assert error["type"] == "invalid_request_error"
    assert set(error) == {"message", "type", "param", "code"}


async def test_an_unknown_model_is_told_what_there_is(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/completions", json={"model": "nobody"})

    assert response.json()["error"]["message"] == "The model `nobody` does not exist. Models here: pirate, small-llama."
    assert response.json()["error"]["param"] == "model"


async def test_the_wrong_method_is_told(client: httpx.AsyncClient) -> None:
    response = await client.get("/v1/completions")

    assert (response.status_code, response.json()["error"]["code"]) == (405, "method_not_allowed")


async def test_models_lists_aliases_with_what_they_stand_for(client: httpx.AsyncClient) -> None:
    listed = (await client.get("/v1/models")).json()

    assert [(it["id"], it["root"], it["parent"]) for it in listed["data"]] == [
        ("small-llama", "small-llama", None),
        ("pirate", OLD.adapter.engine_name, "small-llama"),
    ]
    assert (await client.get("/v1/models/pirate")).json() == listed["data"][1]
    assert (await client.get("/v1/models/nobody")).status_code == 404


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
    engine: FakeEngine, make_gateway: MakeGateway, model: str
) -> None:
    engine.max_running_requests = 1
    gateway = await make_gateway()
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
    published = await client.post("/admin/v1/adapters", json=body(), headers=ADMIN)
    after = await client.post("/v1/completions", json={"model": "pirate"})
    finish.set()

    both = sorted([OLD.adapter.engine_name, NEW.adapter.engine_name])
    assert published.status_code == 200, published.text
    assert after.json() == [NEW.adapter.engine_name, both]
    assert (await before).json() == [OLD.adapter.engine_name, both]
    assert after.headers["x-graft-model"] == NEW.adapter.engine_name
    assert (await before).headers["x-graft-model"] == OLD.adapter.engine_name


def body(**changes: object) -> dict[str, object]:
    return {"candidate": asdict(NEW) | changes}


@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {TOKEN}"}])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/admin/v1/adapters"),
        ("POST", "/admin/v1/adapters"),
        ("GET", "/admin/v1/adapters/pirate"),
        ("DELETE", "/admin/v1/adapters/pirate"),
        ("GET", "/admin/v1/adapters/pirate/history"),
        ("GET", "/admin/v1/history"),
        *(("POST", f"/admin/v1/adapters/pirate/{verb}") for verb in ("promote", "rollback", "abandon", "pin", "unpin")),
        ("GET", "/admin/v1/replicas"),
        ("POST", "/v1/load_lora_adapter"),
        ("POST", "/v1/unload_lora_adapter"),
    ],
)
async def test_the_admin_api_needs_its_token(
    client: httpx.AsyncClient, method: str, path: str, headers: dict[str, str]
) -> None:
    response = await client.request(method, path, json=body(), headers=headers)

    assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_admin_token")


@pytest.mark.parametrize(
    ("changes", "status", "code", "message"),
    [
        pytest.param({"base": "c" * 64}, 422, "adapter_rejected", "made for the base model cccc", id="other-base"),
        pytest.param({"rank": 32}, 422, "adapter_rejected", "--max-lora-rank 32", id="rank"),
        pytest.param({"name": "small-llama"}, 422, "adapter_rejected", "name of the base model", id="base-name"),
        pytest.param({"revision": "d" * 64}, 503, "adapter_unavailable", "not in the adapter store", id="no-files"),
        pytest.param({"revision": "../../etc"}, 400, "invalid_body", "revision", id="path-as-revision"),
        pytest.param({"name": "a@b"}, 400, "invalid_body", "name", id="separator-in-name"),
        pytest.param({"path": "/etc"}, 400, "invalid_body", "path", id="unknown-field"),
    ],
)
async def test_a_candidate_that_cannot_be_served_is_refused_before_anything_is_recorded(
    client: httpx.AsyncClient, log: CatalogueLog, changes: dict[str, object], status: int, code: str, message: str
) -> None:
    epoch = log.read().epoch

    response = await client.post("/admin/v1/adapters", json=body(**changes), headers=ADMIN)

    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert message in response.json()["error"]["message"]
    assert log.read().epoch == epoch


async def test_a_retired_adapter_is_gone_for_new_requests_and_from_the_engine(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    retired = await client.delete("/admin/v1/adapters/pirate", headers=ADMIN)

    assert retired.json() == {"model": "pirate", "replicas": 1}
    assert (await client.post("/v1/completions", json={"model": "pirate"})).status_code == 404
    assert [it["id"] for it in (await client.get("/v1/models")).json()["data"]] == ["small-llama"]
    assert engine.resident == set()


async def test_retiring_what_is_not_there_is_told(client: httpx.AsyncClient) -> None:
    response = await client.delete("/admin/v1/adapters/nobody", headers=ADMIN)

    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


async def test_replicas_are_listed_with_what_their_engines_hold(client: httpx.AsyncClient) -> None:
    response = await client.get("/admin/v1/replicas", headers=ADMIN)

    assert response.json() == {
        "replicas": [
            {
                "replica": "replica-1",
                "epoch": 2,
                "resident": [OLD.adapter.engine_name],
                "running_requests": 0,
                "waiting_requests": 0,
                "failures": {},
                "repairs": [],
                "address": None,
                "passed_on_requests": 0,
                "splits": {},
            }
        ]
    }


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


async def test_the_description_names_every_public_route_and_no_other(client: httpx.AsyncClient) -> None:
    described = (await client.get("/openapi.json")).json()["paths"]

    own = {"/health", "/v1/models", "/v1/models/{name}"}
    assert set(described) == {*ENGINE_ROUTES, *own}


async def test_a_route_that_the_model_cannot_answer_is_refused_and_not_unknown(
    engine: FakeEngine, make_gateway: MakeGateway
) -> None:
    engine.routes = tuple(path for path in ENGINE_ROUTES if path != "/v1/embeddings")
    async with calling(await make_gateway()) as client:
        response = await client.post("/v1/embeddings", json={"model": "pirate", "input": "hi"})
        described = (await client.get("/openapi.json")).json()["paths"]

    assert (response.status_code, response.json()["error"]["code"]) == (400, "task_unsupported")
    assert "/v1/embeddings" not in described


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
@pytest.mark.parametrize(
    ("body", "status", "kind", "code"),
    [
        (b'{"model": "nobody"}', 404, "not_found_error", "model_not_found"),
        (b"[]", 400, "invalid_request_error", "invalid_body"),
        (b'{"prompt": "' + b"a" * MAX_BODY_BYTES + b'"}', 413, "request_too_large", "body_too_large"),
    ],
)
async def test_errors_of_anthropics_routes_have_anthropics_shape(
    client: httpx.AsyncClient, path: str, body: bytes, status: int, kind: str, code: str
) -> None:
    response = await client.post(path, content=body)

    told = response.json()
    assert response.status_code == status
    assert (told["type"], told["error"]["type"], told["error"]["code"]) == ("error", kind, code)
    assert told["error"]["message"]
