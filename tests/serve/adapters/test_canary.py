from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.adapters.canary import RequestOutcome, is_in_share, judge
from serve.catalogue.split import Split, SplitPolicy

REVISION = "a" * 64
TERMS = SplitPolicy(share=0.2, max_error_rate=0.05, max_latency_ratio=1.5, min_requests=40)


def split(share: float, revision: str = REVISION) -> Split:
    return Split(kind="canary", revision=revision, terms=SplitPolicy(share=share))


def outcomes(
    count: int, *, error_rate: float = 0.0, median_s: float = 0.1, seed: int = 0, spread: float = 0.3
) -> list[RequestOutcome]:
    """Simulated requests: log-normal times to the first byte, independent failures."""
    chance = random.Random(seed)
    return [
        RequestOutcome(
            at_s=number, failed=chance.random() < error_rate, first_byte_s=median_s * chance.lognormvariate(0, spread)
        )
        for number in range(count)
    ]


def test_the_share_of_callers_is_what_was_asked_for() -> None:
    callers = [f"caller-{number}" for number in range(20_000)]

    assert sum(is_in_share(split(0.2), caller) for caller in callers) / len(callers) == pytest.approx(0.2, abs=0.01)
    assert sum(is_in_share(split(1), caller) for caller in callers) == len(callers)


@given(caller=st.text(), share=st.floats(0.01, 1), larger=st.floats(0.01, 1))
def test_a_caller_stays_on_its_side_and_stays_in_when_the_share_grows(caller: str, share: float, larger: float) -> None:
    assert is_in_share(split(share), caller) == is_in_share(split(share), caller)
    if is_in_share(split(min(share, larger)), caller):
        assert is_in_share(split(max(share, larger)), caller)


def test_another_canary_is_not_always_tried_on_the_same_callers() -> None:
    callers = [f"caller-{number}" for number in range(2000)]
    first, second = split(0.2), split(0.2, "b" * 64)

    both = sum(is_in_share(first, caller) and is_in_share(second, caller) for caller in callers)

    assert both / len(callers) == pytest.approx(0.04, abs=0.015)


@pytest.mark.parametrize(
    ("canary", "reason"),
    [
        pytest.param(outcomes(100, seed=1), None, id="as-good"),
        pytest.param(outcomes(100, error_rate=0.3, seed=1), "requests failed", id="fails-more"),
        pytest.param(outcomes(100, median_s=0.3, seed=1), "first byte took", id="slower"),
        pytest.param(outcomes(100, median_s=0.11, seed=1), None, id="a-little-slower"),
        pytest.param(outcomes(39, error_rate=1, seed=1), None, id="too-few-to-say"),
        pytest.param(outcomes(40, error_rate=1, seed=1), "100.0% of its 40 requests failed", id="all-fail"),
    ],
)
def test_a_canary_is_given_up_for_what_it_does_worse(canary: list[RequestOutcome], reason: str | None) -> None:
    verdict = judge(TERMS, outcomes(200), canary)

    assert (verdict is None) == (reason is None)
    assert reason is None or (verdict and reason in verdict)


def test_errors_that_both_revisions_have_are_not_the_canarys() -> None:
    assert judge(TERMS, outcomes(2000, error_rate=0.3), outcomes(2000, error_rate=0.3, seed=1)) is None


def test_nothing_is_decided_before_the_stable_revision_was_seen_as_well() -> None:
    assert judge(TERMS, outcomes(39), outcomes(100, error_rate=1)) is None


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6))
def test_a_canary_that_is_as_good_is_not_given_up_by_chance(seed: int) -> None:
    canary = outcomes(400, error_rate=0.005, seed=seed + 1)

    assert judge(TERMS, outcomes(1000, error_rate=0.005, seed=seed), canary) is None


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6))
def test_a_canary_that_is_far_worse_is_always_given_up(seed: int) -> None:
    stable = outcomes(200, error_rate=0.005, seed=seed)

    assert judge(TERMS, stable, outcomes(100, error_rate=0.4, seed=seed + 1))
    assert judge(TERMS, stable, outcomes(100, median_s=0.3, seed=seed + 1))
