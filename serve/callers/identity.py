"""Who asks: its key where callers are known, and a stable name to share queues fairly and to split traffic by."""

from __future__ import annotations

import hashlib

from starlette.types import Scope

from serve.entry import CALLER_HEADER
from serve.keys import Key

_KEY = "graft.key"  # of a scope; no header can set it
_CALLER_HEADER = CALLER_HEADER.encode()


def with_key(scope: Scope, key: Key) -> Scope:
    return {**scope, _KEY: key}


def key_of(scope: Scope) -> Key | None:
    """None where callers need no key, or on a route that asks for none."""
    key: Key | None = scope.get(_KEY)
    return key


def caller_of(scope: Scope) -> str:
    """The id of the caller's key. Without keys a digest of what it is known by: its `Authorization`, else its
    `x-graft-caller` header, else the address that the connection comes from. Behind a proxy everyone without either
    header is one caller."""
    if key := key_of(scope):
        return key.id
    headers = dict(scope["headers"])
    client = scope.get("client")
    known_by = headers.get(b"authorization") or headers.get(_CALLER_HEADER) or (client[0] if client else "").encode()
    return hashlib.sha256(known_by).hexdigest()[:16]
