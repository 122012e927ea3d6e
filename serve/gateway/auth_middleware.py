"""Authentication: finds the key or the identity token of a request's caller, and refuses unknown callers."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from serve.callers.identity import with_key
from serve.callers.keys import Key, KeyRing
from serve.callers.oidc import Issuer, looks_like_token
from serve.errors import InvalidApiKey, ServeError
from serve.gateway.public_routes import error_response
from serve.observability.request_record import record_of

# Routes that need no key. Kubernetes probes /health without one, and the response of /health has no content.
_PUBLIC = frozenset({"/health"})
# Routes whose endpoints authenticate the caller: by an admin token, which is not an API key, or by a key with `admin`.
_ADMIN_PATHS = ("/admin/", "/v1/load_lora_adapter", "/v1/unload_lora_adapter")


class Authentication:
    """ASGI middleware. A caller sends its key as `Authorization: Bearer KEY` or as `x-api-key: KEY`, or a token of the
    OIDC issuer in its place."""

    def __init__(self, app: ASGIApp, keys: KeyRing | None, issuer: Issuer | None = None) -> None:
        self._app = app
        self._keys = keys
        self._issuer = issuer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path: str = scope["path"]
        if path in _PUBLIC:
            await self._app(scope, receive, send)  # its answer must not wait for an identity provider
            return
        secret = secret_of(scope)
        try:
            key = await self._find(secret) if secret else None
        except ServeError as error:
            await _refuse(error, scope, receive, send)
            return
        if key is not None:
            await self._app(with_key(scope, key), receive, send)
        elif path.startswith(_ADMIN_PATHS):
            await self._app(scope, receive, send)
        else:
            await _refuse(InvalidApiKey(given=bool(secret)), scope, receive, send)

    async def _find(self, secret: str) -> Key | None:
        key = self._keys.find(secret) if self._keys else None
        if key is None and self._issuer and looks_like_token(secret):
            key = await self._issuer.find(secret)
        return key


async def _refuse(error: ServeError, scope: Scope, receive: Receive, send: Send) -> None:
    record_of(scope).failed(error.code, error.status)
    await error_response(error, scope["path"])(scope, receive, send)


def secret_of(scope: Scope) -> str:
    """The key or token that the caller sent, or an empty string. The first header of each name counts, and
    `Authorization` before `x-api-key`."""
    api_key = ""
    for name, value in scope["headers"]:
        if name == b"authorization":
            scheme, _, secret = value.partition(b" ")
            if scheme.lower() == b"bearer":
                return str(secret.strip().decode("latin-1"))
        elif name == b"x-api-key" and not api_key:
            api_key = value.strip().decode("latin-1")
    return api_key
