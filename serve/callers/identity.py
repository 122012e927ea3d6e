"""The caller of a request: its key, if the server requires keys, and an id to queue fairly and split traffic by."""

from __future__ import annotations

import hashlib

from starlette.types import Scope

from serve.callers.keys import Key
from serve.catalogue.entry import CALLER_HEADER

_KEY = "graft.key"  # in the ASGI scope, which no header can set
_CALLER_HEADER = CALLER_HEADER.encode()


def with_key(scope: Scope, key: Key) -> Scope:
    """A scope whose caller was authenticated with `key`."""
    return {**scope, _KEY: key}


def key_of(scope: Scope) -> Key | None:
    """The key of the caller; None if the server or the route requires none."""
    key: Key | None = scope.get(_KEY)
    return key


def caller_of(scope: Scope) -> str:
    """The id of the caller's key. Without keys, a digest of the `Authorization` header, else of the `x-graft-caller`
    header, else of the client's address. Behind a proxy all callers without either header are one caller."""
    if key := key_of(scope):
        return key.id
    headers = dict(scope["headers"])
    client = scope.get("client")
    address = client[0] if client else ""
    identity = headers.get(b"authorization") or headers.get(_CALLER_HEADER) or address.encode()
    return hashlib.sha256(identity).hexdigest()[:16]
