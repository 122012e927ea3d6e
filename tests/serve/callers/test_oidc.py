"""Tokens are signed with real keys, and the public keys come from a real server."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jwt.algorithms import ECAlgorithm, RSAAlgorithm
from pydantic import ValidationError

from serve.callers.oidc import Issuer
from serve.catalogue.adapter_store import AdapterStore
from serve.errors import IssuerUnavailable
from serve.settings import Allowance, Grant, OidcSettings
from tests.serve.fakes import FakeEngine
from tests.serve.guarded import bearer, generate, guarded_gateway

ISSUER, AUDIENCE = "https://id.example", "graft"
ROLES = {
    "admins": Grant(admin=True),
    "french-users": Grant(models=("french",), limits=Allowance(requests_per_minute=2)),
}
RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)
OTHER_RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)
EC = ec.generate_private_key(ec.SECP256R1())


class Provider:
    """Serves its public keys, and counts the requests."""

    def __init__(self) -> None:
        self.keys: dict[str, Any] = {"rsa": RSA}
        self.asked = 0
        self.status = 200
        provider = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                provider.asked += 1
                body = json.dumps({"keys": provider.document()}).encode()
                self.send_response(provider.status)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}/jwks.json"

    def document(self) -> list[dict[str, Any]]:
        return [
            {
                **(RSAAlgorithm if kid.startswith("rsa") else ECAlgorithm).to_jwk(key.public_key(), as_dict=True),
                "kid": kid,
            }
            for kid, key in self.keys.items()
        ]


@pytest.fixture
def provider() -> Iterator[Provider]:
    provider = Provider()
    yield provider
    provider.server.shutdown()
    provider.server.server_close()


def settings(jwks: str, **changes: Any) -> OidcSettings:
    return OidcSettings(issuer=ISSUER, audience=AUDIENCE, jwks=jwks, roles=ROLES, **changes)


def token(key: Any = RSA, kid: str | None = "rsa", algorithm: str = "RS256", **changes: Any) -> str:
    claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": "Jo@example", "exp": time.time() + 60, "roles": ["french-users"]}
    claims = {name: value for name, value in (claims | changes).items() if value is not None}
    return jwt.encode(claims, key, algorithm, headers={"kid": kid} if kid else {})


async def test_a_good_token_is_a_key_of_its_caller_with_what_its_role_may(provider: Provider) -> None:
    issuer = Issuer(settings(provider.url))

    key = await issuer.find(token())

    assert key is not None
    assert (key.id, key.models, key.admin) == ("oidc:Jo@example", ("french",), False)
    assert key.limits.requests_per_minute == 2
    assert (await issuer.find(token(roles="x admins french-users"))).admin, "the first of the settings"  # type: ignore[union-attr]
    assert (await issuer.find(token(sub="a/b:{c}"))).id == "oidc:a%2Fb%3A%7Bc%7D"  # type: ignore[union-attr]
    assert provider.asked == 1


def unsigned() -> str:
    def part(document: dict[str, Any]) -> str:
        return base64.urlsafe_b64encode(json.dumps(document).encode()).rstrip(b"=").decode()

    claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": "jo", "exp": time.time() + 60, "roles": ["admins"]}
    return f"{part({'alg': 'none', 'kid': 'rsa'})}.{part(claims)}."


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param(token(exp=time.time() - 60), id="expired"),
        pytest.param(token(nbf=time.time() + 86_400, exp=time.time() + 2 * 86_400), id="not-yet"),
        pytest.param(token(iss="https://evil.example"), id="of-someone-else"),
        pytest.param(token(aud="another"), id="for-something-else"),
        pytest.param(token(key=OTHER_RSA), id="signed-by-someone-else"),
        pytest.param(token(kid="unknown"), id="unknown-key"),
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
        pytest.param(token()[:-4] + "AAAA", id="changed"),
        pytest.param("eyJ.eyJ.x", id="rubbish"),
    ],
)
async def test_any_other_token_is_none(provider: Provider, bad: str) -> None:
    assert await Issuer(settings(provider.url)).find(bad) is None


async def test_a_new_key_of_the_issuer_is_found_and_invented_ones_do_not_flood_it(
    provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    issuer = Issuer(settings(provider.url))
    assert await issuer.find(token())
    monkeypatch.setattr("serve.callers.oidc._MIN_FETCH_INTERVAL_S", 0.0)
    provider.keys = {"rsa": RSA, "ec": EC}
    assert await issuer.find(token(EC, "ec", "ES256"))
    monkeypatch.setattr("serve.callers.oidc._MIN_FETCH_INTERVAL_S", 60.0)
    asked = provider.asked

    for number in range(20):
        assert await issuer.find(token(kid=f"invented-{number}")) is None

    assert provider.asked == asked


async def test_the_keys_of_an_issuer_that_is_away_are_kept(provider: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    issuer, late = Issuer(settings(provider.url)), Issuer(settings(provider.url))
    assert await issuer.find(token())
    provider.status = 500
    monkeypatch.setattr("serve.callers.oidc._KEYS_MAX_AGE_S", 0.0)
    monkeypatch.setattr("serve.callers.oidc._MIN_FETCH_INTERVAL_S", 0.0)

    assert await issuer.find(token())
    with pytest.raises(IssuerUnavailable):
        await late.find(token())
    provider.status = 200
    assert await late.find(token())


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
