"""Accepts tokens of an identity provider (OpenID Connect) in place of API keys.

Signatures are verified here, with the public keys that the provider publishes. So the provider is asked for its keys
only, and not for each request.
"""

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

from serve.callers.keys import Key
from serve.errors import IssuerUnavailable
from serve.settings import Grant, OidcSettings

_KEYS_MAX_AGE_S = 600.0  # older keys are fetched again: the issuer may have withdrawn one
_MIN_FETCH_INTERVAL_S = 10.0  # anyone can send tokens with unknown key ids, each of which would cause a fetch
_TIMEOUT_S = 5.0
_LEEWAY_S = 30  # how far the clocks of issuer and server may differ
_MAX_TOKEN_LENGTH = 16384
_PREFIX = "oidc:"  # the colon is not allowed in the ids of a file of keys

logger = logging.getLogger(__name__)


class Issuer:
    """One identity provider, as the settings name it."""

    def __init__(self, settings: OidcSettings) -> None:
        self._settings = settings
        self._keys: dict[str, jwt.PyJWK] = {}
        self._fetched_s = -_KEYS_MAX_AGE_S
        self._tried_s = -_MIN_FETCH_INTERVAL_S
        self._fetching = asyncio.Lock()

    async def find(self, token: str) -> Key | None:
        """A key for the token's caller, with the grant of the first role in the settings that the token has. None if
        the token is invalid or has none of the roles. Raises IssuerUnavailable if the issuer's keys could never be
        fetched."""
        try:
            key = await self._key_of(jwt.get_unverified_header(token))
            claims = self._verified(token, key) if key else None
        except jwt.InvalidTokenError:
            return None
        return self._caller(claims) if claims else None

    def _verified(self, token: str, key: jwt.PyJWK) -> dict[str, Any]:
        settings = self._settings
        # The key names its algorithm, and the settings name those that are allowed. The `alg` of the token's header is
        # ignored.
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
        claimed_roles = _roles(claims.get(self._settings.role_claim))
        for role, grant in self._settings.roles.items():
            if role in claimed_roles:
                return _key(str(claims[self._settings.caller_claim]), grant)
        return None

    async def _key_of(self, header: Mapping[str, Any]) -> jwt.PyJWK | None:
        kid = header.get("kid")
        now = time.monotonic()
        if kid not in self._keys or now - self._fetched_s > _KEYS_MAX_AGE_S:
            async with self._fetching:
                await self._fetch(kid)
        return self._keys.get(str(kid))

    async def _fetch(self, kid: object) -> None:
        """Fetch the issuer's keys, unless another task has just done so, or the last attempt was too recent."""
        now = time.monotonic()
        is_fresh = now - self._fetched_s <= _KEYS_MAX_AGE_S
        if (is_fresh and kid in self._keys) or now - self._tried_s < _MIN_FETCH_INTERVAL_S:
            return
        self._tried_s = now
        try:
            key_set = jwt.PyJWKSet.from_json(await self._read_jwks())
        except (OSError, ValueError, httpx.HTTPError, jwt.PyJWTError) as error:
            logger.error("the keys of %s can't be fetched: %r", self._settings.issuer, error)
            if not self._keys:
                self._tried_s = -_MIN_FETCH_INTERVAL_S
                raise IssuerUnavailable from error
            return  # the previous keys stay in force
        self._keys = {str(key.key_id): key for key in key_set.keys if key.key_id}
        self._fetched_s = now

    async def _read_jwks(self) -> str:
        location = self._settings.jwks
        if "://" not in location:
            return await asyncio.to_thread(Path(location).read_text)
        # The provider may be outside, where the environment's proxy is the way.
        async with httpx.AsyncClient(timeout=_TIMEOUT_S) as client:
            response = await client.get(location)
            response.raise_for_status()
            return response.text


def looks_like_token(secret: str) -> bool:
    """Whether a secret has the form of a JSON Web Token, which no secret of a file of keys has."""
    return secret.count(".") == 2 and secret.startswith("eyJ") and len(secret) <= _MAX_TOKEN_LENGTH


def _roles(claim: object) -> list[Any]:
    """The roles of a token, whose claim is a list, or one string of words; empty for anything else."""
    if isinstance(claim, str):
        return claim.split()
    return claim if isinstance(claim, list) else []


def _key(caller: str, grant: Grant) -> Key:
    """The key of a caller, whose id is the issuer's name of that caller, escaped. pydantic does not validate the key,
    because the pattern of a KeyId would refuse that id."""
    fields = {name: getattr(grant, name) for name in Grant.model_fields}
    return Key.model_construct(id=_PREFIX + quote(caller, safe="@")[:200], secrets=(), expires=None, **fields)
