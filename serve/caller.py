"""Who asks: a stable key for one caller, to share queues fairly and to keep a caller on one side of a split."""

from __future__ import annotations

import hashlib

from starlette.types import Scope

from serve.entry import CALLER_HEADER

_CALLER_HEADER = CALLER_HEADER.encode()


def caller_of(scope: Scope) -> str:
    """A digest of what the caller is known by: its `Authorization`, else its `x-graft-caller` header, else the
    address that the connection comes from. Behind a proxy everyone without either header is one caller."""
    headers = dict(scope["headers"])
    client = scope.get("client")
    known_by = headers.get(b"authorization") or headers.get(_CALLER_HEADER) or (client[0] if client else "").encode()
    return hashlib.sha256(known_by).hexdigest()[:16]
