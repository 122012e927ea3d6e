from __future__ import annotations

import asyncio

import pytest

from serve.adapters.canary import RequestOutcome
from serve.adapters.publish import Control
from serve.adapters.rollout import Rollouts, begin_split, end_split
from serve.catalogue.adapter_store import AdapterStore
from serve.catalogue.candidate import Candidate
from serve.catalogue.entry import Audit
from serve.catalogue.log import CatalogueLog
from serve.catalogue.split import Split, SplitPolicy
from serve.errors import AdapterRejected, PublishFailed, SplitRefused, UnknownModel
from serve.names import RequestedModel
from tests.serve.adapters.test_publish import ALIAS, NEW, OLD, Fleet
from tests.serve.conftest import candidate
from tests.serve.guarded import until

TERMS = SplitPolicy(share=0.5, min_requests=10, max_error_rate=0.1)
THIRD = candidate("pirate", "third")


@pytest.fixture
async def fleet(log: CatalogueLog, store: AdapterStore) -> Fleet:
    """`pirate` is NEW, and OLD is what it was before."""
    fleet = Fleet(log, store, size=2)
    for reconciler in fleet.reconcilers:
        reconciler.keep_previous = 0
    await Control(log, fleet).publish(OLD)
    await Control(log, fleet).publish(NEW)
    return fleet


async def test_a_canary_is_resident_everywhere_before_it_gets_its_share(fleet: Fleet, log: CatalogueLog) -> None:
    reports = await begin_split(Control(log, fleet), "pirate", OLD.revision, "canary", TERMS)

    assert len(reports) == 2
    assert all(engine.resident == {OLD.adapter, NEW.adapter} for engine in fleet.engines)
    assert fleet.answers == {NEW.adapter}, "the alias stays where it is"
    for reconciler in fleet.reconcilers:
        assert reconciler.catalogue.split_of("pirate").revision == OLD.revision  # type: ignore[union-attr]


async def test_a_canary_that_a_replica_can_not_hold_changes_nothing(fleet: Fleet, log: CatalogueLog) -> None:
    fleet.engines[1].refuses = {OLD.adapter}

    with pytest.raises(PublishFailed, match="rank too large"):
        await begin_split(Control(log, fleet), "pirate", OLD.revision[:12], "canary", TERMS)
    await fleet.sync()

    assert log.read().split_of("pirate") is None
    assert all(engine.resident == {NEW.adapter} for engine in fleet.engines)


async def test_a_split_that_ends_leaves_the_engines(fleet: Fleet, log: CatalogueLog) -> None:
    await begin_split(Control(log, fleet), "pirate", OLD.revision, "shadow", TERMS)

    await end_split(Control(log, fleet), "pirate", "shadow", Audit(reason="seen enough"))

    assert log.read().split_of("pirate") is None
    assert all(engine.resident == {NEW.adapter} for engine in fleet.engines)
    with pytest.raises(SplitRefused, match="no such shadow"):
        await end_split(Control(log, fleet), "pirate", "shadow", Audit(reason="again"))


async def test_a_promoted_canary_gets_everyone_and_the_split_is_over(fleet: Fleet, log: CatalogueLog) -> None:
    await begin_split(Control(log, fleet), "pirate", OLD.revision, "canary", TERMS)

    await Control(log, fleet).publish(OLD)

    assert fleet.answers == {OLD.adapter}
    assert log.read().split_of("pirate") is None
    assert all(engine.resident == {OLD.adapter} for engine in fleet.engines)


async def test_publishing_a_third_revision_ends_the_canary(fleet: Fleet, log: CatalogueLog) -> None:
    await begin_split(Control(log, fleet), "pirate", OLD.revision, "canary", TERMS)

    await Control(log, fleet).publish(THIRD)

    assert log.read().split_of("pirate") is None
    assert all(engine.resident == {THIRD.adapter} for engine in fleet.engines)


async def test_the_share_of_a_running_canary_can_grow(fleet: Fleet, log: CatalogueLog) -> None:
    await begin_split(Control(log, fleet), "pirate", OLD.revision, "canary", TERMS)

    await begin_split(Control(log, fleet), "pirate", OLD.revision, "canary", SplitPolicy(share=0.9))

    assert log.read().split_of("pirate").terms.share == 0.9  # type: ignore[union-attr]
    assert log.read().staged == {OLD.adapter}


@pytest.mark.parametrize("revision", [NEW.revision, "0" * 12, OLD.revision[:6]], ids=["current", "unknown", "short"])
async def test_a_split_that_makes_no_sense_is_refused(fleet: Fleet, log: CatalogueLog, revision: str) -> None:
    epoch = log.read().epoch

    with pytest.raises(SplitRefused):
        await begin_split(Control(log, fleet), "pirate", revision, "canary", TERMS)
    with pytest.raises(UnknownModel):
        await begin_split(Control(log, fleet), "nobody", OLD.revision, "canary", TERMS)

    assert log.read().epoch == epoch


async def test_callers_are_split_and_each_stays_where_it_is(fleet: Fleet, log: CatalogueLog) -> None:
    catalogue = (await begin_split(Control(log, fleet), "pirate", OLD.revision, "canary", TERMS)) and log.read()
    rollouts = Rollouts(give_up=lambda *_: asyncio.sleep(0))
    callers = [f"caller-{number}" for number in range(200)]

    first = [rollouts.choose(catalogue, NEW.adapter, caller).adapter for caller in callers]
    again = [rollouts.choose(catalogue, NEW.adapter, caller).adapter for caller in callers]

    assert first == again
    assert 60 < first.count(OLD.adapter) < 140
    assert set(first) == {OLD.adapter, NEW.adapter}


async def test_a_shadow_never_answers_anyone(fleet: Fleet, log: CatalogueLog) -> None:
    await begin_split(Control(log, fleet), "pirate", OLD.revision, "shadow", TERMS)
    rollouts = Rollouts(give_up=lambda *_: asyncio.sleep(0))

    choices = [rollouts.choose(log.read(), NEW.adapter, "one caller") for _ in range(100)]

    assert {choice.adapter for choice in choices} == {NEW.adapter}
    assert 25 < sum(choice.shadow == OLD.adapter for choice in choices) < 75, "a share of requests, not of callers"


async def test_a_canary_that_fails_is_given_up_on_every_replica_with_its_reason(
    fleet: Fleet, log: CatalogueLog
) -> None:
    await begin_split(Control(log, fleet), "pirate", OLD.revision, "canary", TERMS)
    given_up: list[str] = []
    ended = asyncio.Event()

    async def give_up(canary: object, reason: str) -> None:
        given_up.append(reason)
        await end_split(Control(log, fleet), "pirate", "canary", Audit(reason=reason), OLD.revision)
        ended.set()

    rollouts = Rollouts(give_up)
    rollouts.choose(log.read(), NEW.adapter, "caller")
    for number in range(20):
        rollouts.record_outcome(NEW.adapter, RequestOutcome(number, failed=False, first_byte_s=0.1))
        rollouts.record_outcome(OLD.adapter, RequestOutcome(number, failed=number % 2 == 0, first_byte_s=0.1))
    await ended.wait()

    assert len(given_up) == 1
    assert "50.0% of its 10 requests failed" in given_up[0]
    assert all(reconciler.catalogue.split_of("pirate") is None for reconciler in fleet.reconcilers)
    assert {reconciler.catalogue.resolve(ALIAS) for reconciler in fleet.reconcilers} == {NEW.adapter}


async def test_a_canary_that_could_not_be_given_up_is_judged_again(fleet: Fleet, log: CatalogueLog) -> None:
    await begin_split(Control(log, fleet), "pirate", OLD.revision, "canary", TERMS)
    attempts: list[str] = []

    async def give_up(canary: object, reason: str) -> None:
        attempts.append(reason)
        raise KeyError("an answer of another replica")

    rollouts = Rollouts(give_up)
    rollouts.choose(log.read(), NEW.adapter, "caller")
    for number in range(20):
        rollouts.record_outcome(NEW.adapter, RequestOutcome(number, failed=False, first_byte_s=0.1))
        rollouts.record_outcome(OLD.adapter, RequestOutcome(number, failed=True, first_byte_s=0.1))
    await until(lambda: not rollouts.stats["pirate"].is_given_up)

    rollouts.record_outcome(OLD.adapter, RequestOutcome(20, failed=True, first_byte_s=0.1))
    await until(lambda: len(attempts) == 2)


async def test_what_is_older_than_the_window_is_forgotten(fleet: Fleet, log: CatalogueLog) -> None:
    await begin_split(Control(log, fleet), "pirate", OLD.revision, "canary", TERMS)
    rollouts = Rollouts(give_up=lambda *_: asyncio.sleep(0))
    rollouts.choose(log.read(), NEW.adapter, "caller")

    for number in range(9):
        rollouts.record_outcome(OLD.adapter, RequestOutcome(number, failed=True, first_byte_s=0.1))
    rollouts.record_outcome(OLD.adapter, RequestOutcome(1000, failed=False, first_byte_s=0.1))

    summary = rollouts.summaries()["pirate"]
    assert (summary["canary_requests"], summary["canary_error_rate"]) == (1, 0)


async def test_a_pinned_revision_and_one_that_was_given_up_are_distinguished(fleet: Fleet, log: CatalogueLog) -> None:
    await begin_split(Control(log, fleet), "pirate", OLD.revision, "canary", TERMS)

    with pytest.raises(SplitRefused):
        await end_split(Control(log, fleet), "pirate", "canary", Audit(reason="of another one"), THIRD.revision)

    assert log.read().split_of("pirate")
    assert log.read().resolve(RequestedModel("pirate", OLD.revision[:12])) == OLD.adapter


async def test_a_rollback_ends_the_canary(fleet: Fleet, log: CatalogueLog) -> None:
    await Control(log, fleet).publish(THIRD)
    await begin_split(Control(log, fleet), "pirate", OLD.revision, "canary", TERMS)

    await Control(log, fleet).roll_back("pirate")

    assert fleet.answers == {NEW.adapter}
    assert log.read().split_of("pirate") is None
    assert log.read().staged == frozenset()


async def test_a_staged_revision_that_was_a_canary_is_given_up_when_another_one_is_promoted(
    fleet: Fleet, log: CatalogueLog
) -> None:
    await Control(log, fleet).stage(THIRD)
    await begin_split(Control(log, fleet), "pirate", THIRD.revision, "canary", TERMS, Audit("ann", "nightly"))
    begun = log.read().revision(THIRD.adapter)
    assert begun is not None
    assert (begun.state, begun.staged, begun.until) == ("staged", True, None)

    await Control(log, fleet).publish(OLD)

    ended = log.read().revision(THIRD.adapter)
    assert ended is not None
    assert (ended.state, ended.staged) == ("abandoned", False)
    entry = next(entry for _, entry in log.history("pirate") if entry.verb == "split")
    assert (entry.by, entry.reason, entry.split) == (
        "ann",
        "nightly",
        Split(kind="canary", revision=THIRD.revision, terms=TERMS),
    )


async def test_a_canary_is_proven_on_every_replica_before_it_gets_its_share(fleet: Fleet, log: CatalogueLog) -> None:
    async def verify(candidate: Candidate) -> None:
        raise AdapterRejected(f"{candidate.adapter} changes nothing")

    fleet.reconcilers[1].verify = verify

    with pytest.raises(PublishFailed, match="changes nothing"):
        await begin_split(Control(log, fleet), "pirate", OLD.revision, "canary", TERMS)

    assert log.read().split_of("pirate") is None
    assert log.read().staged == frozenset()


async def test_a_canary_survives_a_snapshot(fleet: Fleet, log: CatalogueLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.catalogue.log.SNAPSHOT_EVERY", 1)
    await begin_split(Control(log, fleet), "pirate", OLD.revision, "canary", TERMS)

    assert log._load_snapshot() == log.read()
    assert log._load_snapshot().split_of("pirate") == Split(kind="canary", revision=OLD.revision, terms=TERMS)
