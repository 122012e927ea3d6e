"""Which callers are admitted, which models they see, and how their usage is counted."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from serve.callers import key_admin
from serve.callers.usage import read_usage
from serve.catalogue.adapter_store import AdapterStore
from serve.gateway.public_routes import ENGINE_ROUTES
from tests.serve.fakes import FakeEngine, respond
from tests.serve.guarded import (
    ADMIN_TOKEN,
    BASE_MODEL,
    PATH,
    Guarded,
    ask,
    bearer,
    code,
    generate,
    guarded_gateway,
    until,
)
from tests.serve.one_replica import calling


@pytest.mark.parametrize(
    "path", [*ENGINE_ROUTES, "/v1/models", f"/v1/models/{BASE_MODEL}", "/nothing", "/metrics", "/"]
)
@pytest.mark.parametrize(
    "headers", [{}, bearer("graft-wrong"), {"authorization": "Basic abc"}, {"x-api-key": "graft-wrong"}, bearer("")]
)
async def test_without_a_valid_key_nothing_is_revealed(
    client: httpx.AsyncClient, path: str, headers: dict[str, str]
) -> None:
    response = await client.request("POST" if path in ENGINE_ROUTES else "GET", path, headers=headers)

    assert code(response) == (401, "invalid_api_key")
    kind = "authentication_error" if path.startswith("/v1/messages") else "invalid_request_error"
    assert response.json()["error"]["type"] == kind
    assert response.headers["www-authenticate"] == "Bearer"


async def test_whoever_watches_the_server_needs_no_key(client: httpx.AsyncClient) -> None:
    assert (await client.get("/health")).status_code == 200


@pytest.mark.parametrize("scheme", ["Bearer ", "bearer ", "BEARER  "])
async def test_a_key_opens_as_openai_and_as_anthropic_send_it(
    server: Guarded, client: httpx.AsyncClient, scheme: str
) -> None:
    server.key("team-a")
    secret = server.secrets["team-a"]

    for headers in ({"authorization": scheme + secret}, {"x-api-key": secret}):
        assert (await client.post(PATH, json=ask(), headers=headers)).status_code == 200


async def test_a_model_outside_the_scope_is_answered_as_one_that_does_not_exist(
    server: Guarded, client: httpx.AsyncClient
) -> None:
    headers = server.key("team-a", models=["french"])

    async def response_to(model: str) -> tuple[int, str]:
        posted = await client.post(PATH, json=ask(model), headers=headers)
        got = await client.get(f"/v1/models/{model}", headers=headers)
        assert (posted.status_code, posted.text) == (got.status_code, got.text)
        return posted.status_code, posted.text.replace(model, "NAME")

    unknown = await response_to("nobody")

    assert unknown[0] == 404
    assert await response_to("german") == unknown
    assert await response_to("secret-plan") == unknown
    assert await response_to(BASE_MODEL) == unknown
    assert "Models here: french." in unknown[1]
    revision = next(adapter for adapter in server.engine.loads if adapter.name == "secret-plan").engine_name
    response = await client.post(PATH, json=ask(revision), headers=headers)
    assert (response.status_code, response.text.replace(revision, "NAME")) == unknown


@pytest.mark.parametrize("model", [None, BASE_MODEL])
async def test_the_base_model_has_to_be_in_the_scope_too(
    server: Guarded, client: httpx.AsyncClient, model: str | None
) -> None:
    headers = server.key("team-a", models=["french"])

    response = await client.post(PATH, json=ask(model), headers=headers)

    assert code(response) == (404, "model_not_found")


async def test_the_list_has_what_the_key_may_use(server: Guarded, client: httpx.AsyncClient) -> None:
    async def listed(headers: dict[str, str]) -> list[str]:
        return [model["id"] for model in (await client.get("/v1/models", headers=headers)).json()["data"]]

    assert await listed(server.key("all")) == [BASE_MODEL, "french", "german", "secret-plan"]
    assert await listed(server.key("some", models=["fr*", "g?rman"])) == ["french", "german"]
    assert await listed(server.key("none", models=[])) == []


async def test_the_admin_api_opens_to_its_tokens_and_to_keys_that_may(
    server: Guarded, client: httpx.AsyncClient
) -> None:
    admin, user = server.key("ops", admin=True), server.key("team-a")

    assert (await client.get("/admin/v1/adapters", headers=bearer(ADMIN_TOKEN))).status_code == 200
    assert (await client.get("/admin/v1/adapters", headers=admin)).status_code == 200
    for headers in (user, {}, bearer("graft-wrong")):
        assert code(await client.get("/admin/v1/adapters", headers=headers)) == (401, "invalid_admin_token")
        load = await client.post("/v1/load_lora_adapter", json={"lora_name": "a", "lora_path": "b"}, headers=headers)
        assert code(load) == (401, "invalid_admin_token")
    assert code(await client.post(PATH, json=ask(), headers=bearer(ADMIN_TOKEN))) == (401, "invalid_api_key")


async def test_history_names_the_key_that_did_it(server: Guarded, client: httpx.AsyncClient) -> None:
    headers = server.key("ops", admin=True) | {"x-graft-caller": "jo"}

    assert (await client.post("/admin/v1/adapters/french/pin", json={}, headers=headers)).status_code == 200

    history = (await client.get("/admin/v1/history", headers=headers)).json()["history"]
    assert history[0]["by"] == "ops/jo"


async def test_keys_are_rotated_under_load_without_one_wrong_refusal(
    server: Guarded, client: httpx.AsyncClient
) -> None:
    server.key("team-a")
    good, statuses, stop = [server.secrets["team-a"]], Counter[int](), asyncio.Event()

    async def load(number: int) -> None:
        while not stop.is_set():
            response = await client.post(PATH, json=ask(), headers=bearer(good[-1 - number % min(2, len(good))]))
            statuses[response.status_code] += 1
            await asyncio.sleep(0)

    async def rotate() -> None:
        for _ in range(20):
            good.append(key_admin.rotate(server.keys, "team-a", timedelta(minutes=1)))
            before = statuses.total()
            await until(lambda before=before: statuses.total() > before + 10)
        stop.set()

    await asyncio.gather(rotate(), *(load(number) for number in range(10)))

    assert set(statuses) == {200}
    assert statuses[200] > 100


async def test_usage_is_counted_by_key_and_model_and_reported(server: Guarded, client: httpx.AsyncClient) -> None:
    first, second, admin = server.key("team-a"), server.key("team-b"), server.key("ops", admin=True)
    for headers, model, times in ((first, "french", 3), (first, BASE_MODEL, 1), (second, "french", 2)):
        for _ in range(times):
            await client.post(PATH, json=ask(model, tokens=5), headers=headers)
    await client.post(PATH, json=ask("nobody"), headers=first)

    answer = (await client.get("/admin/v1/usage", headers=admin)).json()

    rows = [
        (row["key"], row["model"], row["requests"], row["prompt_tokens"], row["completion_tokens"])
        for row in answer["usage"]
    ]
    assert rows == [
        ("team-a", "french", 3, 9, 15),
        ("team-a", BASE_MODEL, 1, 3, 5),
        ("team-b", "french", 2, 6, 10),
    ]
    today = datetime.now(UTC).date()
    assert read_usage(server.meter._objects, today, today) == answer["usage"]
    for wrong in ("since=yesterday", "since=2026-01-02&until=2026-01-01", "since=1000-01-01"):
        assert code(await client.get(f"/admin/v1/usage?{wrong}", headers=admin)) == (400, "invalid_body")
    assert code(await client.get("/admin/v1/usage", headers=first)) == (401, "invalid_admin_token")


async def test_neither_key_nor_prompt_is_logged(
    server: Guarded, client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    headers = server.key("team-a", limits={"requests_per_minute": 3})

    async def fail(scope: Scope, receive: Receive, send: Send) -> None:
        raise RuntimeError("a bug")

    with caplog.at_level(logging.DEBUG):
        for handler in (generate, fail):
            server.engine.handler = handler
            for _ in range(2):
                await client.post(PATH, json=ask(prompt="a private question"), headers=headers)
        await client.post(PATH, json=ask(), headers=bearer("graft-unknown-key"))
    logged = "\n".join(f"{record.getMessage()} {record.exc_text or ''}" for record in caplog.records)
    assert "a bug" in logged
    for secret in (server.secrets["team-a"], "graft-unknown-key", "a private question"):
        assert secret not in logged


async def test_pages_of_the_named_origins_may_call_from_a_browser(
    engine: FakeEngine, store: AdapterStore, tmp_path: Path
) -> None:
    engine.handler = generate
    server = await guarded_gateway(tmp_path, store, engine, cors_origins=("https://good.example",))
    headers = server.key("team-a")
    preflight = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}

    async with calling(server.gateway) as client:
        good = await client.options(PATH, headers=preflight | {"origin": "https://good.example"})
        bad = await client.options(PATH, headers=preflight | {"origin": "https://bad.example"})
        answer = await client.post(PATH, json=ask(), headers=headers | {"origin": "https://good.example"})
        refused = await client.post(PATH, json=ask(), headers={"origin": "https://good.example"})
    assert good.status_code == 200
    assert good.headers["access-control-allow-origin"] == "https://good.example"
    assert (bad.status_code, "access-control-allow-origin" in bad.headers) == (400, False)
    assert answer.headers["access-control-allow-origin"] == "https://good.example"
    assert "x-ratelimit-remaining-tokens" in answer.headers["access-control-expose-headers"]
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "https://good.example", "or the page could not read why"


async def test_trace_context_and_request_id_reach_the_engine(server: Guarded, client: httpx.AsyncClient) -> None:
    seen: dict[str, str] = {}

    async def look(scope: Scope, receive: Receive, send: Send) -> None:
        seen.update({name.decode(): value.decode() for name, value in scope["headers"]})
        await respond(send, 200, b"{}")

    server.engine.handler = look
    sent = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "x-request-id": "mine"}
    for model in (BASE_MODEL, "french"):
        seen.clear()
        await client.post(PATH, json=ask(model), headers=server.key(f"for-{model}") | sent)
        assert seen.items() >= sent.items()
