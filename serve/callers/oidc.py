"""Tokens of an identity provider (OpenID Connect) as keys: who signed one is checked here, nobody is asked for each."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import jwt

from serve.config import OidcSettings
from serve.errors import IssuerUnavailable
from serve.keys import Grant, Key

_FRESH_S = 600.0  # the issuer may take a key back
_BETWEEN_S = 10.0  # unknown keys are looked for no more often than that: anyone can invent them
_TIMEOUT_S = 5.0
_LEEWAY_S = 30  # that clocks may differ
_LONGEST = 16384
_PREFIX = "oidc:"  # an id that no key in a file can have

logger = logging.getLogger(__name__)


class Issuer:
    """One identity provider, as the settings name it."""

    def __init__(self, settings: OidcSettings) -> None:
        self._settings = settings
        self._keys: dict[str, jwt.PyJWK] = {}
        self._fetched_s = -_FRESH_S
        self._tried_s = -_BETWEEN_S
        self._fetching = asyncio.Lock()

    async def find(self, token: str) -> Key | None:
        """What the token's first known role may do, as a key of its caller; None if the token is not good, or has no
        known role. Raises IssuerUnavailable if the issuer's keys were never fetched."""
        try:
            key = await self._key_of(jwt.get_unverified_header(token))
            claims = self._verified(token, key) if key else None
        except jwt.InvalidTokenError:
            return None
        return self._caller(claims) if claims else None

    def _verified(self, token: str, key: jwt.PyJWK) -> dict[str, Any]:
        settings = self._settings
        # The key says which algorithm it is for, and the settings which are taken; the token is not asked.
        claims: dict[str, Any] = jwt.decode(
            token,
            key,
            algorithms=list(settings.algorithms),
            audience=settings.audience,
            issuer=settings.issuer,
            leeway=_LEEWAY_S,
            options={"require": ["exp", "iss", "aud", settings.caller_claim]},
        )
        return claims

    def _caller(self, claims: Mapping[str, Any]) -> Key | None:
        told = claims.get(self._settings.role_claim, ())
        held = told.split() if isinstance(told, str) else told if isinstance(told, list) else []
        for role, grant in self._settings.roles.items():
            if role in held:
                return _key(str(claims[self._settings.caller_claim]), grant)
        return None

    async def _key_of(self, header: Mapping[str, Any]) -> jwt.PyJWK | None:
        kid = header.get("kid")
        now = time.monotonic()
        if kid not in self._keys or now - self._fetched_s > _FRESH_S:
            async with self._fetching:
                await self._fetch(kid)
        return self._keys.get(str(kid))

    async def _fetch(self, kid: object) -> None:
        now = time.monotonic()
        is_fresh = now - self._fetched_s <= _FRESH_S
        if (is_fresh and kid in self._keys) or now - self._tried_s < _BETWEEN_S:
            return
        self._tried_s = now
        try:
            found = jwt.PyJWKSet.from_json(await self._document())
        except (OSError, ValueError, httpx.HTTPError, jwt.PyJWTError) as error:
            logger.error("the keys of %s can't be fetched: %r", self._settings.issuer, error)
            if not self._keys:
                self._tried_s = -_BETWEEN_S
                raise IssuerUnavailable from error
            return  # those before stay good
        self._keys = {str(key.key_id): key for key in found.keys if key.key_id}
        self._fetched_s = now

    async def _document(self) -> str:
        place = self._settings.jwks
        if "://" not in place:
            return await asyncio.to_thread(Path(place).read_text)
        async with httpx.AsyncClient(timeout=_TIMEOUT_S) as client:
            response = await client.get(place)
            response.raise_for_status()
            return response.text


def looks_like_token(secret: str) -> bool:
    return secret.count(".") == 2 and secret.startswith("eyJ") and len(secret) <= _LONGEST


def _key(caller: str, grant: Grant) -> Key:
    """Not checked as those of a file are: its id is the issuer's, with everything but letters and digits escaped."""
    fields = {name: getattr(grant, name) for name in Grant.model_fields}
    return Key.model_construct(id=_PREFIX + quote(caller, safe="@")[:200], secrets=(), expires=None, **fields)
