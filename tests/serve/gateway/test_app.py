"""Which routes are public, and what they answer to a request that reaches no engine."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from serve.catalogue.adapter_store import AdapterStore
from serve.gateway.public_routes import ENGINE_ROUTES
from tests.serve.fakes import FakeEngine
from tests.serve.one_replica import MAX_BODY_BYTES, OLD, calling, gateway_of


@pytest.mark.parametrize("path", ENGINE_ROUTES)
async def test_every_public_route_reaches_the_engine(client: httpx.AsyncClient, path: str) -> None:
    response = await client.post(path, json={"model": "pirate"})

    assert response.status_code == 200, response.text
    assert response.json()["path"] == path


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/scale_elastic_ep"),
        ("POST", "/sleep"),
        ("POST", "/start_profile"),
        ("POST", "/invocations"),
        ("GET", "/metrics"),
        ("GET", "/docs"),
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
        pytest.param(b'{"prompt": "\xff"}', 400, "invalid_body", id="not-utf-8-in-another-field"),
        pytest.param('{"model": "pirate"}'.encode("utf-16"), 400, "invalid_body", id="utf-16"),
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


async def test_the_answer_to_an_unknown_model_lists_the_models(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/completions", json={"model": "nobody"})

    assert response.json()["error"]["message"] == "The model `nobody` does not exist. Models here: pirate, small-llama."
    assert response.json()["error"]["param"] == "model"


async def test_the_wrong_method_is_reported(client: httpx.AsyncClient) -> None:
    response = await client.get("/v1/completions")

    assert (response.status_code, response.json()["error"]["code"]) == (405, "method_not_allowed")
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/v1/models", "GET, HEAD"),
        ("/admin/v1/adapters", "GET, HEAD, POST"),
        ("/admin/v1/adapters/pirate", "DELETE, GET, HEAD"),
    ],
)
async def test_the_answer_to_a_wrong_method_lists_those_of_every_route_with_the_path(
    client: httpx.AsyncClient, path: str, allowed: str
) -> None:
    response = await client.put(path)

    assert (response.status_code, response.headers["allow"]) == (405, allowed)


@pytest.mark.parametrize(
    ("method", "path", "location"),
    [
        ("POST", "/v1/completions/", "/v1/completions"),
        ("GET", "/v1/models/", "/v1/models"),
        ("GET", "/v1/models/pirate/?x=1", "/v1/models/pirate?x=1"),
    ],
)
async def test_a_path_with_a_slash_at_its_end_is_redirected_on_the_same_host(
    client: httpx.AsyncClient, method: str, path: str, location: str
) -> None:
    response = await client.request(method, path, headers={"host": "elsewhere.example"})

    assert (response.status_code, response.headers["location"]) == (307, location)


@pytest.mark.parametrize("path", ["//elsewhere.example/", "//v1/models/", "/scale_elastic_ep/", "/"])
async def test_no_other_path_is_redirected(client: httpx.AsyncClient, path: str) -> None:
    assert (await client.get(f"http://graft{path}")).status_code == 404


async def test_a_byte_order_mark_before_the_body_is_ignored(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/completions", content=b'\xef\xbb\xbf{"model": "pirate"}')

    assert response.status_code == 200
    assert response.json()["body"] == f'{{"model":"{OLD.adapter.engine_name}"}}'


async def test_models_lists_aliases_with_what_they_stand_for(client: httpx.AsyncClient) -> None:
    listed = (await client.get("/v1/models")).json()

    assert [(model["id"], model["root"], model["parent"]) for model in listed["data"]] == [
        ("small-llama", "small-llama", None),
        ("pirate", OLD.adapter.engine_name, "small-llama"),
    ]
    assert (await client.get("/v1/models/pirate")).json() == listed["data"][1]
    assert (await client.get("/v1/models/nobody")).status_code == 404


async def test_the_name_that_an_answer_has_is_a_model_of_its_own(client: httpx.AsyncClient) -> None:
    pinned, alias = [(await client.get(f"/v1/models/{name}")).json() for name in (OLD.adapter.engine_name, "pirate")]

    assert pinned == alias | {"id": OLD.adapter.engine_name}
    assert (await client.get("/v1/models/pirate@000000000000")).status_code == 404


async def test_every_model_has_the_length_of_its_context(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    listed = (await client.get("/v1/models")).json()["data"]

    assert [model["max_model_len"] for model in listed] == [engine.context_tokens] * 2


async def test_the_description_names_every_public_route_and_no_other(client: httpx.AsyncClient) -> None:
    described = (await client.get("/openapi.json")).json()["paths"]

    own = {"/health", "/health/{name}", "/v1/models", "/v1/models/{name}"}
    assert set(described) == {*ENGINE_ROUTES, *own}


async def test_a_route_that_the_model_cannot_answer_is_refused_and_not_unknown(
    engine: FakeEngine, store: AdapterStore, tmp_path: Path
) -> None:
    engine.routes = tuple(path for path in ENGINE_ROUTES if path != "/v1/embeddings")
    async with calling(await gateway_of(engine, store, tmp_path)) as client:
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

    answer = response.json()
    assert response.status_code == status
    assert (answer["type"], answer["error"]["type"], answer["error"]["code"]) == ("error", kind, code)
    assert answer["error"]["message"]
