"""Accepts tokens of an identity provider (OpenID Connect) in place of API keys.

Signatures are verified here, with the public keys that the provider publishes. So the provider is asked for its keys
only, and not for each request.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import jwt

from serve.callers.keys import Key
from serve.callers.signing_keys import SigningKeys
from serve.settings import Grant, OidcSettings

_LEEWAY_S = 30  # how far the clocks of issuer and server may differ
_MAX_TOKEN_LENGTH = 16384
_PREFIX = "oidc:"  # the colon is not allowed in the ids of a file of keys
_VERIFIED_CLAIMS = ("exp", "nbf", "iat", "aud", "iss", "sub", "jti")


class Issuer:
    """One identity provider, as the settings name it."""

    def __init__(self, settings: OidcSettings) -> None:
        self.keys = SigningKeys(settings)
        self._settings = settings

    async def find(self, token: str) -> Key | None:
        """A key for the token's caller, with the grant of the first role in the settings that the token has. None if
        the token is invalid or has none of the roles. Raises IssuerUnavailable if the token may be valid, but the
        issuer's key for it can't be had."""
        try:
            kid = self._key_id_of(token)
            if not self.keys.has(kid) and self._caller(self._claims(token)) is None:
                return None  # whatever key there may be
            key = await self.keys.find(kid)
            return self._caller(self._claims(token, key)) if key else None
        except jwt.InvalidTokenError:
            return None

    def _key_id_of(self, token: str) -> str:
        """Raises InvalidTokenError for a token that no key of the issuer can have signed."""
        header = jwt.get_unverified_header(token)
        if header.get("alg") not in self._settings.algorithms or "kid" not in header:
            raise jwt.InvalidTokenError
        return str(header["kid"])

    def _claims(self, token: str, key: jwt.PyJWK | None = None) -> dict[str, Any]:
        """The claims of a token that the key has signed. Without a key, all but the signature is verified. Raises
        InvalidTokenError."""
        settings = self._settings
        options: dict[str, Any] = {f"verify_{claim}": True for claim in _VERIFIED_CLAIMS}
        options["verify_signature"] = key is not None
        options["require"] = ["exp", "iss", "aud", settings.caller_claim]
        # The key names its algorithm, and the settings name those that are allowed. A token whose header names another
        # one is refused.
        claims: dict[str, Any] = jwt.decode(
            token,
            key or "",
            algorithms=list(settings.algorithms),
            audience=settings.audience,
            issuer=settings.issuer,
            leeway=_LEEWAY_S,
            options=options,  # type: ignore[arg-type]
        )
        return claims

    def _caller(self, claims: Mapping[str, Any]) -> Key | None:
        claimed_roles = _roles(claims.get(self._settings.role_claim))
        for role, grant in self._settings.roles.items():
            if role in claimed_roles:
                return _key(str(claims[self._settings.caller_claim]), grant)
        return None


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
