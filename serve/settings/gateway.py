"""Settings of the HTTP side of a replica."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from serve.settings.callers import OidcSettings, SecretDigest
from serve.settings.frozen import FrozenSettings


class GatewaySettings(FrozenSettings):
    """The HTTP side of a replica."""

    max_body_bytes: PositiveInt = Field(32 << 20, description="Larger request bodies get a 413.")
    body_memory_bytes: PositiveInt | None = Field(
        None,
        description="Bytes of all request bodies that a replica holds at a time; a request beyond them gets a 503. "
        "Default: a sixteenth of the memory, and at least twice max_body_bytes.",
    )
    max_waiting_requests: PositiveInt = Field(
        128, description="Requests that may wait for an adapter slot of one replica, or for its engine; more get a 503."
    )
    max_waiting_per_caller: PositiveInt = Field(64, description="Of one caller; more get a 429.")
    max_wait_s: PositiveFloat = Field(
        30.0, description="A request that got no slot, or no place in the engine, for this long gets a 503."
    )
    max_wake_s: PositiveFloat = Field(
        180.0, description="A request for a sleeping pool that no engine has taken for this long gets a 503."
    )
    max_run_s: PositiveFloat = Field(
        600.0, description="A request that has run in the engine for this long is ended, with a 504 or in its stream."
    )
    max_running_requests: PositiveInt | None = Field(
        None, description="Requests in a replica's engine at a time; default: vLLM's max_num_seqs less one, for checks."
    )
    max_output_tokens: PositiveInt | None = Field(
        None, description="Most output tokens of one answer: a request for more gets a 400. It is also the default."
    )
    body_timeout_s: PositiveFloat = Field(30.0, description="A body that has not arrived by then gets a 408.")
    send_timeout_s: PositiveFloat = Field(
        60.0, description="The request of a client that reads nothing of its response for this long is cancelled."
    )
    adapter_turn_s: PositiveFloat = Field(
        1.0, description="While others wait, an adapter takes new requests for this long, then gives its slot away."
    )
    admin_tokens: dict[str, SecretDigest] = Field(
        description="SHA-256 of every bearer token of the admin API by its label, which history names as the author."
    )
    keys_file: Path | None = Field(
        None, description="Keys of the callers, followed while it changes; none: everyone may use every model."
    )
    oidc: OidcSettings | None = Field(None, description="An identity provider whose tokens are taken as keys too.")
    limits_url: str | None = Field(
        None, description="A Redis that counts the limits of keys, as redis://HOST:PORT/0; none: this Ray's memory."
    )
    limits_when_unavailable: Literal["refuse", "allow"] = Field(
        "refuse", description="What a caller with limits gets while they can't be counted: a 503, or no limits."
    )
    lease_s: Annotated[float, Field(ge=0.5)] = Field(
        15.0, description="A replica that died gives the concurrent requests of its callers back after this long."
    )
    usage_flush_s: PositiveFloat = Field(5.0, description="How often usage is written; a killed replica loses so much.")
    cors_origins: tuple[str, ...] = Field(
        (), description="Origins of web pages that may call from a browser; `*` for all; none: no CORS."
    )

    @property
    def knows_callers(self) -> bool:
        """Whether requests are authenticated: only callers with a key or a token are served."""
        return bool(self.keys_file or self.oidc)

    @property
    def least_body_memory_bytes(self) -> int:
        """Less would keep the largest body out for ever: small bodies have a part for themselves."""
        return 2 * self.max_body_bytes

    @model_validator(mode="after")
    def _have_room_for_the_largest_body(self) -> Self:
        if self.body_memory_bytes is not None and self.body_memory_bytes < self.least_body_memory_bytes:
            raise ValueError(
                f"body_memory_bytes is {self.body_memory_bytes}; it must be at least twice max_body_bytes: "
                f"{self.least_body_memory_bytes}"
            )
        return self
