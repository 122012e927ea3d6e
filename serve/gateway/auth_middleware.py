"""Lets a request in if its caller is known, and writes down who it is."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from serve.caller import with_key
from serve.errors import InvalidApiKey, ServeError
from serve.keys import Key, KeyRing
from serve.oidc import Issuer, looks_like_token
from serve.openai import error_response
from serve.request_record import record_of

# Asked by whatever watches the server; says nothing.
_PUBLIC = frozenset({"/health"})
# Behind tokens of their own, which their endpoints check; a key with `admin` opens them too.
_ADMIN = ("/admin/", "/v1/load_lora_adapter", "/v1/unload_lora_adapter")


class Authentication:
    """ASGI middleware. A caller sends its key as `Authorization: Bearer KEY`, or as `x-api-key: KEY`; or a token of the
    issuer in its place."""

    def __init__(self, app: ASGIApp, keys: KeyRing | None, issuer: Issuer | None = None) -> None:
        self._app = app
        self._keys = keys
        self._issuer = issuer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        secret = secret_of(scope)
        try:
            key = await self._find(secret) if secret else None
        except ServeError as error:
            await _refuse(error, scope, receive, send)
            return
        path: str = scope["path"]
        if key is not None:
            await self._app(with_key(scope, key), receive, send)
        elif path in _PUBLIC or path.startswith(_ADMIN):
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
    """What the caller sent as its key, empty if nothing. The first header of each name counts."""
    told = ""
    for name, value in scope["headers"]:
        if name == b"authorization":
            scheme, _, secret = value.partition(b" ")
            if scheme.lower() == b"bearer":
                return str(secret.strip().decode("latin-1"))
        elif name == b"x-api-key" and not told:
            told = value.strip().decode("latin-1")
    return told
