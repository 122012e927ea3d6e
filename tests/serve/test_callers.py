"""Who is let in, what it may see, and what its limits and its usage are."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from serve import key_writing
from serve.ledger import Claim, LedgerUnreachable, LocalLedger, Verdict
from serve.openai import ENGINE_ROUTES
from serve.store import AdapterStore
from serve.usage import read_usage
from tests.serve.fakes import FakeEngine, respond
from tests.serve.guarded import ADMIN_TOKEN, BASE_MODEL, Guarded, bearer, generate, guarded_gateway, until

PATH = "/v1/completions"


@pytest.fixture
async def server(engine: FakeEngine, store: AdapterStore, tmp_path: Path) -> Guarded:
    engine.handler = generate
    return await guarded_gateway(tmp_path, store, engine)


@pytest.fixture
async def client(server: Guarded) -> AsyncIterator[httpx.AsyncClient]:
    async with open_client(server) as client:
        yield client


def open_client(server: Guarded) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(server.gateway, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://graft")


def ask(model: str | None = BASE_MODEL, tokens: int = 4, **fields: Any) -> dict[str, Any]:
    return {"model": model, "prompt": "hi", "max_tokens": tokens} | fields


def code(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


@pytest.mark.parametrize(
    "path", [*ENGINE_ROUTES, "/v1/models", f"/v1/models/{BASE_MODEL}", "/nothing", "/metrics", "/"]
)
@pytest.mark.parametrize(
    "headers", [{}, bearer("graft-wrong"), {"authorization": "Basic abc"}, {"x-api-key": "graft-wrong"}, bearer("")]
)
async def test_without_a_good_key_nothing_is_told(
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

    async def told(model: str) -> tuple[int, str]:
        posted = await client.post(PATH, json=ask(model), headers=headers)
        got = await client.get(f"/v1/models/{model}", headers=headers)
        assert (posted.status_code, posted.text) == (got.status_code, got.text)
        return posted.status_code, posted.text.replace(model, "NAME")

    unknown = await told("nobody")

    assert unknown[0] == 404
    assert await told("german") == unknown
    assert await told("secret-plan") == unknown
    assert await told(BASE_MODEL) == unknown
    assert "Models here: french." in unknown[1]
    revision = next(it for it in server.engine.loads if it.name == "secret-plan").engine_name
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
        return [it["id"] for it in (await client.get("/v1/models", headers=headers)).json()["data"]]

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
            good.append(key_writing.rotate(server.keys, "team-a", timedelta(minutes=1)))
            await asyncio.sleep(0.02)
        stop.set()

    await asyncio.gather(rotate(), *(load(number) for number in range(10)))

    assert set(statuses) == {200}
    assert statuses[200] > 100


async def test_of_200_at_once_exactly_as_many_as_may_get_through(server: Guarded, client: httpx.AsyncClient) -> None:
    headers = server.key("team-a", limits={"requests_per_minute": 50})

    answers = await asyncio.gather(*(client.post(PATH, json=ask(), headers=headers) for _ in range(200)))

    assert Counter(it.status_code for it in answers) == {200: 50, 429: 150}
    refused = next(it for it in answers if it.status_code == 429)
    assert code(refused) == (429, "rate_limit_exceeded")
    assert refused.json()["error"]["type"] == "requests"
    assert 0 < int(refused.headers["retry-after"]) <= 60
    assert refused.headers["x-ratelimit-limit-requests"] == "50"
    assert {it.headers["x-ratelimit-remaining-requests"] for it in answers} == {str(left) for left in range(50)}
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    other = await client.post(PATH, json=ask(), headers=server.key("team-b", limits={"requests_per_minute": 1}))
    assert other.status_code == 200


async def test_a_limit_of_each_model_and_one_of_all_hold_together(server: Guarded, client: httpx.AsyncClient) -> None:
    headers = server.key(
        "team-a", limits={"requests_per_minute": 5}, limits_per_model={"?r*": {"requests_per_minute": 2}}
    )

    async def admitted(model: str, times: int) -> int:
        answers = [await client.post(PATH, json=ask(model), headers=headers) for _ in range(times)]
        return sum(it.status_code == 200 for it in answers)

    assert await admitted("french", 4) == 2
    assert await admitted("german", 2) == 2, "which has no limit of its own"
    assert await admitted(BASE_MODEL, 4) == 1, "what one model refused did not count against all"
    refused = await client.post(PATH, json=ask("french"), headers=headers)
    assert "the key `team-a`" in refused.json()["error"]["message"]


async def test_tokens_are_reserved_before_and_settled_to_what_was_used(
    server: Guarded, client: httpx.AsyncClient
) -> None:
    headers = server.key("team-a", limits={"tokens_per_minute": 400})

    first = await client.post(PATH, json=ask(tokens=100), headers=headers)
    assert int(first.headers["x-ratelimit-remaining-tokens"]) < 300 - 3, "its prompt may be longer than it was"
    again = await client.post(PATH, json=ask(tokens=100), headers=headers)
    reserved = 300 - int(first.headers["x-ratelimit-remaining-tokens"])
    assert int(again.headers["x-ratelimit-remaining-tokens"]) == 400 - 103 - 100 - reserved

    refused = await client.post(PATH, json=ask(tokens=100), headers=headers)
    assert refused.status_code == 200, "206 used, so 194 are left"
    refused = await client.post(PATH, json=ask(tokens=100), headers=headers)
    assert (code(refused), refused.json()["error"]["type"]) == ((429, "rate_limit_exceeded"), "tokens")
    assert "x-should-retry" not in refused.headers


async def test_a_request_larger_than_the_limit_is_told_that_it_will_never_get_through(
    server: Guarded, client: httpx.AsyncClient
) -> None:
    headers = server.key("team-a", limits={"tokens_per_minute": 40})

    refused = await client.post(PATH, json=ask(tokens=64), headers=headers)

    assert code(refused) == (429, "rate_limit_exceeded")
    assert "retry-after" not in refused.headers
    assert refused.headers["x-should-retry"] == "false"
    assert "more than that" in refused.json()["error"]["message"]


async def test_concurrent_requests_are_bounded_and_come_back(server: Guarded, client: httpx.AsyncClient) -> None:
    headers = server.key("team-a", limits={"concurrent_requests": 3})
    go_on = asyncio.Event()

    async def slowly(scope: Scope, receive: Receive, send: Send) -> None:
        await go_on.wait()
        await generate(scope, receive, send)

    server.engine.handler = slowly
    running = [asyncio.create_task(client.post(PATH, json=ask(), headers=headers)) for _ in range(3)]
    await until(lambda: server.gateway.passages.limiter.running == 3)
    refused = await client.post(PATH, json=ask(), headers=headers)
    assert code(refused) == (429, "rate_limit_exceeded")
    assert "3 concurrent requests" in refused.json()["error"]["message"]

    go_on.set()
    assert {(await it).status_code for it in running} == {200}
    assert (await client.post(PATH, json=ask(), headers=headers)).status_code == 200


async def test_a_caller_that_leaves_gives_its_place_back_and_pays_what_it_reserved(
    server: Guarded, client: httpx.AsyncClient
) -> None:
    headers = server.key("team-a", limits={"concurrent_requests": 1, "tokens_per_minute": 300})

    async def forever(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    server.engine.handler = forever
    running = asyncio.create_task(client.post(PATH, json=ask(tokens=100), headers=headers))
    await until(lambda: server.gateway.passages.places.taken == 1)
    running.cancel()
    await asyncio.wait({running})

    passages = server.gateway.passages
    assert (passages.limiter.running, passages.places.taken, passages.readers.watched_now) == (0, 0, 0)
    server.engine.handler = generate
    answered = await client.post(PATH, json=ask(tokens=4), headers=headers)
    assert answered.status_code == 200
    assert int(answered.headers["x-ratelimit-remaining-tokens"]) < 200


class Broken(LocalLedger):
    """Books that can't be reached."""

    async def reserve(self, claim: Claim) -> Verdict:
        raise LedgerUnreachable("gone")


@pytest.mark.parametrize(("choice", "status"), [("refuse", 503), ("allow", 200)])
async def test_while_limits_cannot_be_counted_callers_with_limits_get_what_the_setting_says(
    engine: FakeEngine, store: AdapterStore, tmp_path: Path, choice: str, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    engine.handler = generate
    server = await guarded_gateway(tmp_path, store, engine, Broken(1), limits_when_unavailable=choice)
    limited, unlimited = server.key("limited", limits={"requests_per_minute": 1}), server.key("unlimited")

    async with open_client(server) as client:
        with caplog.at_level(logging.ERROR):
            answers = [await client.post(PATH, json=ask(), headers=limited) for _ in range(3)]
        assert {it.status_code for it in answers} == {status}
        assert (await client.post(PATH, json=ask(), headers=unlimited)).status_code == 200
    told = [it for it in caplog.records if it.levelno >= logging.ERROR]
    assert len(told) == 1, "an outage is told once"
    if status == 503:
        assert code(answers[0]) == (503, "limits_unavailable")


async def test_output_is_capped_and_who_asks_for_more_is_told(
    engine: FakeEngine, store: AdapterStore, tmp_path: Path
) -> None:
    engine.handler = generate
    server = await guarded_gateway(tmp_path, store, engine, max_output_tokens=8)
    headers = server.key("team-a")

    async with open_client(server) as client:
        for model in (BASE_MODEL, "french"):
            asked = (await client.post(PATH, json={"model": model, "prompt": "hi"}, headers=headers)).json()["asked"]
            assert asked["max_tokens"] == 8
            assert asked["prompt"] == "hi"
        assert (await client.post(PATH, json=ask(tokens=8), headers=headers)).status_code == 200
        refused = await client.post(PATH, json=ask(tokens=9), headers=headers)
    assert code(refused) == (400, "output_too_long")
    assert refused.json()["error"]["param"] == "max_tokens"


async def test_usage_is_counted_by_key_and_model_and_told(server: Guarded, client: httpx.AsyncClient) -> None:
    first, second, admin = server.key("team-a"), server.key("team-b"), server.key("ops", admin=True)
    for headers, model, times in ((first, "french", 3), (first, BASE_MODEL, 1), (second, "french", 2)):
        for _ in range(times):
            await client.post(PATH, json=ask(model, tokens=5), headers=headers)
    await client.post(PATH, json=ask("nobody"), headers=first)

    told = (await client.get("/admin/v1/usage", headers=admin)).json()

    rows = [
        (it["key"], it["model"], it["requests"], it["prompt_tokens"], it["completion_tokens"]) for it in told["usage"]
    ]
    assert rows == [
        ("team-a", "french", 3, 9, 15),
        ("team-a", BASE_MODEL, 1, 3, 5),
        ("team-b", "french", 2, 6, 10),
    ]
    today = datetime.now(UTC).date()
    assert read_usage(server.meter._objects, today, today) == told["usage"]
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
    logged = "\n".join(f"{it.getMessage()} {it.exc_text or ''}" for it in caplog.records)
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

    async with open_client(server) as client:
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
    told = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "x-request-id": "mine"}
    for model in (BASE_MODEL, "french"):
        seen.clear()
        await client.post(PATH, json=ask(model), headers=server.key(f"for-{model}") | told)
        assert seen.items() >= told.items()
