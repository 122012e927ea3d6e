"""An identity provider: a real HTTP server with real keys, which can be away in several ways."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jwt.algorithms import ECAlgorithm, RSAAlgorithm

from serve.settings import Allowance, Grant, OidcSettings

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
        self.use: str | None = None
        self.status = 200
        self.asked = 0
        self.open = self.most_open = 0  # requests that are not answered
        self.answering = threading.Event()  # while it is clear, requests hang
        self.answering.set()
        self.trickling = False  # sends a byte now and then, and never the last one
        self._lock = threading.Lock()
        provider = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                with provider._lock:
                    provider.asked += 1
                    provider.open += 1
                    provider.most_open = max(provider.open, provider.most_open)
                try:
                    self._answer()
                except OSError:
                    pass  # the client has given up
                finally:
                    with provider._lock:
                        provider.open -= 1

            def _answer(self) -> None:
                provider.answering.wait()
                body = json.dumps({"keys": provider.document()}).encode()
                self.send_response(provider.status)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                while provider.trickling:
                    self.wfile.write(b" ")
                    time.sleep(0.01)
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/jwks.json"

    def document(self) -> list[dict[str, Any]]:
        return [
            {
                **(RSAAlgorithm if kid.startswith("rsa") else ECAlgorithm).to_jwk(key.public_key(), as_dict=True),
                "kid": kid,
                "use": self.use,
            }
            for kid, key in self.keys.items()
        ]

    def close(self) -> None:
        self.trickling = False
        self.answering.set()
        self._server.shutdown()
        self._server.server_close()


def settings(jwks: str, **changes: Any) -> OidcSettings:
    return OidcSettings(issuer=ISSUER, audience=AUDIENCE, jwks=jwks, roles=ROLES, **changes)


def token(key: Any = RSA, kid: str | None = "rsa", algorithm: str = "RS256", **changes: Any) -> str:
    claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": "Jo@example", "exp": time.time() + 60, "roles": ["french-users"]}
    claims = {name: value for name, value in (claims | changes).items() if value is not None}
    return jwt.encode(claims, key, algorithm, headers={"kid": kid} if kid else {})
