"""A second revision that gets a share of an alias's traffic, as the catalogue records it.

`serve.adapters.canary` decides by it which revision answers a request.
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

from convert.artifact import Sha256

Kind = Literal["canary", "shadow"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class SplitPolicy(BaseModel):
    """How large the share is, and how much worse than the stable revision a canary may be. Catalogue entries hold these
    fields, so their names stay."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    share: Annotated[float, Field(gt=0, le=1)] = Field(
        0.1, description="The share of the callers (canary) or of the requests (shadow)."
    )
    max_error_rate: Annotated[float, Field(ge=0, le=1)] = Field(
        0.02, description="A canary may fail this share of its requests more often than the stable revision."
    )
    max_latency_ratio: Annotated[float, Field(ge=1)] = Field(
        1.5, description="Its median time to the first byte may be this many times the stable revision's."
    )
    min_requests: PositiveInt = Field(50, description="Fewer requests of either revision decide nothing.")
    window_s: PositiveFloat = Field(300.0, description="Requests that ended earlier are not compared.")


class Split(BaseModel):
    """A revision that gets traffic beside the one that the alias points to. A canary answers its share of the callers;
    a shadow gets copies of its share of the requests, and no caller sees its answers. Catalogue entries hold these
    fields, so their names stay."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind
    revision: Sha256
    terms: SplitPolicy = SplitPolicy()
