"""Tokens are signed with real keys, and the public keys come from a real server."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from pydantic import ValidationError

from serve.callers.oidc import Issuer
from serve.catalogue.adapter_store import AdapterStore
from tests.serve.callers.provider import AUDIENCE, ISSUER, OTHER_RSA, Provider, settings, token
from tests.serve.fakes import FakeEngine
from tests.serve.guarded import bearer, generate, guarded_gateway


async def test_a_good_token_is_a_key_of_its_caller_with_what_its_role_may(provider: Provider) -> None:
    issuer = Issuer(settings(provider.url))

    key = await issuer.find(token())

    assert key is not None
    assert (key.id, key.models, key.admin) == ("oidc:Jo@example", ("french",), False)
    assert key.limits.requests_per_minute == 2
    assert (await issuer.find(token(roles="x admins french-users"))).admin, "the first of the settings"  # type: ignore[union-attr]
    assert (await issuer.find(token(sub="a/b:{c}"))).id == "oidc:a%2Fb%3A%7Bc%7D"  # type: ignore[union-attr]
    assert provider.asked == 1


def part(text: str) -> str:
    return base64.urlsafe_b64encode(text.encode()).rstrip(b"=").decode()


def unsigned() -> str:
    claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": "jo", "exp": time.time() + 60, "roles": ["admins"]}
    return f"{part(json.dumps({'alg': 'none', 'kid': 'rsa'}))}.{part(json.dumps(claims))}."


# What is wrong with these can be seen without the issuer's keys.
HOPELESS = [
    pytest.param(token(exp=time.time() - 60), id="expired"),
    pytest.param(token(nbf=time.time() + 86_400, exp=time.time() + 2 * 86_400), id="not-yet"),
    pytest.param(token(iss="https://evil.example"), id="of-someone-else"),
    pytest.param(token(aud="another"), id="for-something-else"),
    pytest.param(token(kid=None), id="no-key-named"),
    pytest.param(token(exp=None), id="never-expires"),
    pytest.param(token(sub=None), id="nobodys"),
    pytest.param(token(aud=None), id="for-nothing"),
    pytest.param(token(roles=["others"]), id="no-known-role"),
    pytest.param(token(roles=None), id="no-role"),
    pytest.param(token(roles=3), id="a-number-as-role"),
    pytest.param(token(algorithm="RS512"), id="another-algorithm"),
    pytest.param(token(key="s" * 64, algorithm="HS256"), id="a-shared-secret"),
    pytest.param(unsigned(), id="not-signed"),
    pytest.param(token().rpartition(".")[0], id="two-parts"),
    pytest.param("eyJ.eyJ.x", id="rubbish"),
    pytest.param(f"{part('[' * 9000)}.{part('{}')}.x", id="a-header-that-is-too-deep"),
]


@pytest.mark.parametrize(
    "bad",
    [
        *HOPELESS,
        pytest.param(token(key=OTHER_RSA), id="signed-by-someone-else"),
        pytest.param(token(kid="unknown"), id="unknown-key"),
        pytest.param(token()[:-4] + "AAAA", id="changed"),
    ],
)
async def test_any_other_token_is_none(provider: Provider, bad: str) -> None:
    assert await Issuer(settings(provider.url)).find(bad) is None


@pytest.mark.parametrize("bad", HOPELESS)
async def test_a_token_that_no_key_can_make_valid_is_refused_without_a_question_to_the_issuer(
    provider: Provider, bad: str
) -> None:
    provider.answering.clear()

    assert await Issuer(settings(provider.url)).find(bad) is None
    assert provider.asked == 0


async def test_keys_may_lie_in_a_file(provider: Provider, tmp_path: Path) -> None:
    (tmp_path / "jwks.json").write_text(json.dumps({"keys": provider.document()}))

    assert await Issuer(settings(str(tmp_path / "jwks.json"))).find(token())


def test_keys_that_anyone_on_the_way_could_change_are_refused() -> None:
    with pytest.raises(ValidationError, match="https"):
        settings("http://id.example/jwks.json")


@pytest.fixture
async def client(
    provider: Provider, engine: FakeEngine, store: AdapterStore, tmp_path: Path
) -> AsyncIterator[httpx.AsyncClient]:
    engine.handler = generate
    server = await guarded_gateway(tmp_path, store, engine, oidc=settings(provider.url))
    transport = httpx.ASGITransport(server.gateway)
    async with httpx.AsyncClient(transport=transport, base_url="http://graft") as client:
        client.headers["x-file-key"] = server.key("from-the-file")["authorization"]
        yield client


async def test_the_gateway_takes_tokens_beside_keys(client: httpx.AsyncClient, provider: Provider) -> None:
    async def status(model: str, headers: dict[str, str]) -> int:
        request = {"model": model, "prompt": "hi"}
        return (await client.post("/v1/completions", json=request, headers=headers)).status_code

    assert [await status("french", bearer(token())) for _ in range(3)] == [200, 200, 429]
    assert await status("german", bearer(token())) == 404
    assert await status("french", bearer(token(key=OTHER_RSA))) == 401
    assert await status("german", {"authorization": client.headers["x-file-key"]}) == 200
    admin = bearer(token(roles=["admins"]))
    usage = (await client.get("/admin/v1/usage", headers=admin)).json()["usage"]
    assert {row["key"] for row in usage} == {"oidc:Jo@example", "from-the-file"}


async def test_an_issuer_that_was_never_reached_is_reported(client: httpx.AsyncClient, provider: Provider) -> None:
    provider.status = 500

    response = await client.post("/v1/completions", json={}, headers=bearer(token()))

    assert (response.status_code, response.json()["error"]["code"]) == (503, "issuer_unavailable")
    assert 1 <= int(response.headers["retry-after"]) <= 2


async def test_health_asks_no_issuer(client: httpx.AsyncClient, provider: Provider) -> None:
    provider.answering.clear()

    response = await client.get("/health", headers=bearer(token()))

    assert (response.status_code, provider.asked) == (200, 0)
