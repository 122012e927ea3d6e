"""A second revision gets a share of an alias's traffic: who gets it, and when it has shown that it is worse.

Pure: what the catalogue says and what was seen go in, a decision comes out.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

from convert.artifact import Sha256

Kind = Literal["canary", "shadow"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class Terms(BaseModel):
    """How large the share is, and how much worse than the stable revision a canary may be."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    share: Annotated[float, Field(gt=0, le=1)] = Field(0.1, description="Of callers for a canary, of requests else.")
    max_error_rate: Annotated[float, Field(ge=0, le=1)] = Field(
        0.02, description="A canary may fail this share of its requests more often than the stable revision."
    )
    max_latency_ratio: Annotated[float, Field(ge=1)] = Field(
        1.5, description="Its median time to the first byte may be this many times the stable revision's."
    )
    min_requests: PositiveInt = Field(50, description="Nothing is decided on fewer requests of either side.")
    window_s: PositiveFloat = Field(300.0, description="What is older than this is forgotten.")


class Split(BaseModel):
    """A revision beside the one that the alias points to. A canary answers its share of callers; a shadow gets
    copies of a share of requests, and nobody sees its answers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind
    revision: Sha256
    terms: Terms = Terms()

    def takes(self, key: str) -> bool:
        """Whether this caller, or this request, is in the share. The same key is always on the same side, and
        stays in when the share grows."""
        digest = hashlib.sha256(f"{self.revision}:{key}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64 < self.terms.share


@dataclass(frozen=True)
class Outcome:
    """One request that was answered, or failed by our fault (a status of 500 or more)."""

    at_s: float
    failed: bool
    first_byte_s: float  # after the engine got it: waiting for a slot says nothing about a revision


def judge(terms: Terms, stable: Sequence[Outcome], canary: Sequence[Outcome]) -> str | None:
    """Why the canary should be given up; None if it is good enough, or too little was seen."""
    if min(len(stable), len(canary)) < terms.min_requests:
        return None
    more = error_rate(canary) - error_rate(stable)
    if more > terms.max_error_rate:
        return (
            f"{error_rate(canary):.1%} of its {len(canary)} requests failed, {error_rate(stable):.1%} of the stable "
            f"revision's; {terms.max_error_rate:.1%} more are allowed"
        )
    times = [[it.first_byte_s for it in side if not it.failed] for side in (stable, canary)]
    if not all(times):
        return None
    before, now = map(statistics.median, times)
    if now > before * terms.max_latency_ratio:
        return (
            f"its first byte took {now:.3f} s (median of {len(canary)}), the stable revision's {before:.3f} s; "
            f"{terms.max_latency_ratio:g} times that is allowed"
        )
    return None


def error_rate(outcomes: Sequence[Outcome]) -> float:
    return sum(it.failed for it in outcomes) / len(outcomes) if outcomes else 0.0
