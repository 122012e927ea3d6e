"""What a caller may do, and who vouches for it."""

from __future__ import annotations

from fnmatch import fnmatchcase
from hashlib import sha256
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PositiveInt, field_validator

from convert.artifact import Sha256
from serve.settings.frozen import FrozenSettings

_NOTHING = sha256().hexdigest()


def _not_of_nothing(digest: str) -> str:
    if digest == _NOTHING:
        raise ValueError("it is the SHA-256 of an empty text, which everybody knows")
    return digest


# The SHA-256 of a secret that callers send.
SecretDigest = Annotated[Sha256, AfterValidator(_not_of_nothing)]


class Allowance(FrozenSettings):
    """Limits of a caller, or of a caller on one model; None means no limit."""

    requests_per_minute: PositiveInt | None = None
    tokens_per_minute: PositiveInt | None = Field(None, description="Prompt and completion together.")
    concurrent_requests: PositiveInt | None = None

    @property
    def is_unlimited(self) -> bool:
        return self == _UNLIMITED


_UNLIMITED = Allowance()


class Grant(FrozenSettings):
    """What a caller may do."""

    models: tuple[str, ...] = Field(("*",), description="Patterns of names; * and ? as in a shell.")
    admin: bool = Field(False, description="May use the admin API.")
    limits: Allowance = Field(_UNLIMITED, description="Limits of all requests of the caller together.")
    limits_per_model: dict[str, Allowance] = Field(
        {},
        description="Pattern → limits for each model that matches, by itself; the first pattern that matches holds.",
    )

    def may_use(self, model: str) -> bool:
        return any(fnmatchcase(model, pattern) for pattern in self.models)

    def limits_of(self, model: str) -> Allowance:
        """The limits of the caller on this one model, besides those of all its requests."""
        fit = (limits for pattern, limits in self.limits_per_model.items() if fnmatchcase(model, pattern))
        return next(fit, _UNLIMITED)


class OidcSettings(FrozenSettings):
    """Tokens of an identity provider that callers may send instead of keys."""

    issuer: str = Field(description="Issuer that a token must have: its `iss`.")
    audience: str = Field(description="Audience that a token must have: its `aud`.")
    jwks: str = Field(description="Public keys of the issuer: an https:// URL, or a file.")
    jwks_max_age_s: float = Field(86400.0, ge=600, description="Of its last public keys while it doesn't answer.")
    algorithms: tuple[Literal["RS256", "RS384", "RS512", "PS256", "ES256", "ES384", "EdDSA"], ...] = Field(
        ("RS256", "ES256"), description="Accepted signature algorithms, whatever a token's header says."
    )
    caller_claim: str = Field("sub", description="The claim that names the caller.")
    role_claim: str = Field("roles", description="The claim with the caller's roles: a list, or one string of words.")
    roles: dict[str, Grant] = Field(
        description="Role → grant. The first role here that a token has counts; a token with none of them is refused."
    )

    @field_validator("jwks")
    @classmethod
    def _be_safe(cls, jwks: str) -> str:
        if jwks.startswith("http://") and not jwks.startswith(("http://127.0.0.1:", "http://localhost:")):
            raise ValueError("keys that come over http:// could be anyone's: use https://")
        return jwks
