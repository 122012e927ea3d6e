"""Canary and shadow: which revision of a split answers a request, and when a canary has proved worse.

Pure functions: the catalogue's split and recorded outcomes go in, a decision comes out. `serve.adapters.rollout` keeps
the outcomes of a replica and acts on the decisions.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from serve.catalogue.split import Split, SplitPolicy
from serve.names import AdapterRevision


@dataclass(frozen=True)
class RevisionChoice:
    """Which revision answers a request, and which one gets a copy of it."""

    adapter: AdapterRevision
    shadow: AdapterRevision | None = None


def choose_revision(split: Split, stable: AdapterRevision, caller: str, request_number: int) -> RevisionChoice:
    """The choice for a request to an alias that points to `stable`.

    A canary gets a share of the callers, so that a caller always meets the same revision. A shadow gets a share of the
    requests: `request_number` must differ between them.
    """
    second = AdapterRevision(stable.name, split.revision)
    if split.kind == "canary":
        return RevisionChoice(second if is_in_share(split, caller) else stable)
    is_copied = is_in_share(split, f"{caller}:{request_number}")
    return RevisionChoice(stable, second if is_copied else None)


def is_in_share(split: Split, key: str) -> bool:
    """Whether a caller or a request, identified by `key`, belongs to the share of the second revision.

    A key is always on the same side of a split, and stays in the share when the share grows. Another revision gets
    another selection of keys.
    """
    digest = hashlib.sha256(f"{split.revision}:{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < split.terms.share


@dataclass(frozen=True)
class RequestOutcome:
    """One request that a revision answered, or that failed by the server's fault (a status of 500 or more)."""

    at_s: float
    failed: bool
    first_byte_s: float  # from the start in the engine: waiting for a slot says nothing about a revision


def judge(policy: SplitPolicy, stable: Sequence[RequestOutcome], canary: Sequence[RequestOutcome]) -> str | None:
    """The reason to give the canary up; None if it is good enough, or if either side has too few requests."""
    if min(len(stable), len(canary)) < policy.min_requests:
        return None
    return _higher_error_rate(policy, stable, canary) or _slower_first_byte(policy, stable, canary)


def error_rate(outcomes: Sequence[RequestOutcome]) -> float:
    return sum(outcome.failed for outcome in outcomes) / len(outcomes) if outcomes else 0.0


def _higher_error_rate(
    policy: SplitPolicy, stable: Sequence[RequestOutcome], canary: Sequence[RequestOutcome]
) -> str | None:
    stable_rate, canary_rate = error_rate(stable), error_rate(canary)
    if canary_rate - stable_rate <= policy.max_error_rate:
        return None
    return (
        f"{canary_rate:.1%} of its {len(canary)} requests failed, {stable_rate:.1%} of the stable revision's; "
        f"{policy.max_error_rate:.1%} more are allowed"
    )


def _slower_first_byte(
    policy: SplitPolicy, stable: Sequence[RequestOutcome], canary: Sequence[RequestOutcome]
) -> str | None:
    stable_s, canary_s = _median_first_byte_s(stable), _median_first_byte_s(canary)
    if stable_s is None or canary_s is None or canary_s <= stable_s * policy.max_latency_ratio:
        return None
    return (
        f"its first byte took {canary_s:.3f} s (median of {len(canary)}), the stable revision's {stable_s:.3f} s; "
        f"{policy.max_latency_ratio:g} times that is allowed"
    )


def _median_first_byte_s(outcomes: Sequence[RequestOutcome]) -> float | None:
    """Of the requests that did not fail; None if all did."""
    times = [outcome.first_byte_s for outcome in outcomes if not outcome.failed]
    return statistics.median(times) if times else None
