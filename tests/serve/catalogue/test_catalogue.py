"""What each step does to the names of the catalogue, and which steps are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from serve.catalogue.catalogue import Catalogue
from serve.catalogue.entry import Audit
from serve.catalogue.log import CatalogueLog
from serve.errors import PublishFailed, TransitionRefused, UnknownModel
from serve.names import RequestedModel
from tests.serve.catalogue.publishing import NEW, OLD, published
from tests.serve.conftest import candidate

ALIAS = RequestedModel("pirate")


def test_an_empty_directory_is_an_empty_catalogue(log: CatalogueLog) -> None:
    assert log.read() == Catalogue()
    assert log.history() == []


def test_a_staged_revision_is_not_yet_what_the_alias_means(log: CatalogueLog) -> None:
    log.stage(OLD)

    catalogue = log.read()
    assert catalogue.staged == {OLD.adapter}
    assert catalogue.resolve(RequestedModel("pirate")) is None


def test_promotion_moves_the_alias_and_keeps_the_old_revision_reachable_by_pin(log: CatalogueLog) -> None:
    for adapter in (OLD, NEW):
        log.stage(adapter)
        log.promote(adapter)

    catalogue = log.read()
    assert catalogue.resolve(RequestedModel("pirate")) == NEW.adapter
    assert catalogue.resolve(RequestedModel("pirate", OLD.revision[:12])) == OLD.adapter
    assert catalogue.staged == frozenset()
    assert catalogue.epoch == 4


@pytest.mark.parametrize("pin", ["", "0", OLD.revision[:11], "f" * 12, OLD.revision + "0"])
def test_a_pin_that_names_no_revision_resolves_to_nothing(log: CatalogueLog, pin: str) -> None:
    log.stage(OLD)
    log.promote(OLD)

    assert log.read().resolve(RequestedModel("pirate", pin)) is None


def test_an_abandoned_revision_cannot_be_promoted(log: CatalogueLog) -> None:
    log.stage(OLD)
    log.abandon(OLD, Audit("ci", "replica 1 could not load it"))

    with pytest.raises(PublishFailed, match="not staged any more"):
        log.promote(OLD)


def test_an_abandoned_revision_is_neither_reachable_nor_counted_as_published(log: CatalogueLog) -> None:
    log.stage(OLD)
    pin = RequestedModel("pirate", OLD.revision[:12])
    assert log.read().resolve(pin) == OLD.adapter

    log.abandon(OLD, Audit("ci", "replica 1 could not load it"))

    assert log.read().resolve(pin) is None
    assert not log.read().was_promoted(OLD.adapter)


def test_a_retired_name_means_nothing_until_it_is_published_again(log: CatalogueLog) -> None:
    log.stage(OLD)
    log.promote(OLD)

    retired = log.retire("pirate")
    assert retired.resolve(RequestedModel("pirate")) is None
    assert retired.resolve(RequestedModel("pirate", OLD.revision)) is None
    assert log.read().wanted == ()
    with pytest.raises(UnknownModel):
        log.retire("pirate")

    log.stage(OLD)
    assert log.promote(OLD).resolve(RequestedModel("pirate")) == OLD.adapter


def test_a_revision_that_was_never_staged_cannot_be_promoted(log: CatalogueLog) -> None:
    with pytest.raises(PublishFailed):
        log.promote(OLD)


def test_a_catalogue_knows_what_its_server_must_be_able_to_hold(log: CatalogueLog) -> None:
    for adapter in (OLD, NEW):
        log.stage(adapter)
        log.promote(adapter)
    other = candidate("json", "1")
    log.stage(other)

    assert log.read().wanted == (other, NEW)


def test_a_rollback_goes_back_step_by_step_and_never_to_what_was_rolled_back_from(log: CatalogueLog) -> None:
    first, second, third = (candidate("pirate", number) for number in "123")
    published(log, first, second, third)

    assert log.roll_back(second).resolve(ALIAS) == second.adapter
    assert [revision.candidate for revision in log.read().adapters["pirate"].previous(9)] == [first]
    assert log.roll_back(first).adapters["pirate"].previous(9) == ()
    newest = published(log, candidate("pirate", "4"))
    assert [revision.candidate for revision in newest.adapters["pirate"].previous(9)] == [first]
    assert newest.resolve(RequestedModel("pirate", third.revision)) == third.adapter


def test_only_what_served_before_can_be_rolled_back_to(log: CatalogueLog) -> None:
    published(log, OLD)
    log.stage(NEW)

    with pytest.raises(TransitionRefused, match="never served"):
        log.roll_back(NEW)


def test_a_rollback_that_is_repeated_is_one_entry(log: CatalogueLog) -> None:
    published(log, OLD, NEW)

    assert log.roll_back(OLD) == log.roll_back(OLD)


def test_a_pinned_revision_is_not_retired_until_it_is_unpinned(log: CatalogueLog) -> None:
    published(log, OLD, NEW)
    log.pin(OLD.adapter, most=1)

    assert log.read().wanted == tuple(sorted((OLD, NEW), key=lambda adapter: adapter.adapter))
    with pytest.raises(TransitionRefused, match="is pinned"):
        log.retire("pirate")
    with pytest.raises(TransitionRefused, match="unpin one"):
        log.pin(NEW.adapter, most=1)
    log.unpin(OLD.adapter)
    assert log.retire("pirate").pinned == frozenset()


def test_a_name_belongs_to_one_base_model_until_it_is_retired(log: CatalogueLog) -> None:
    published(log, OLD)
    elsewhere = replace(NEW, base="e" * 64)

    with pytest.raises(TransitionRefused, match=r"belongs to an adapter for another base model, bbbbbbbbbbbb"):
        log.stage(elsewhere)
    assert log.read().staged == frozenset()
    log.retire("pirate")
    assert published(log, elsewhere).resolve(ALIAS) == elsewhere.adapter


def test_each_base_model_has_its_part_of_the_catalogue(log: CatalogueLog) -> None:
    elsewhere = replace(candidate("french", "1"), base="e" * 64)
    catalogue = published(log, OLD, elsewhere)
    log.retire("french")

    assert catalogue.of_base(OLD.base).current == {OLD.adapter}
    assert catalogue.of_base(elsewhere.base).current == {elsewhere.adapter}
    assert catalogue.of_base("f" * 64).adapters == {}
    assert catalogue.of_base(None) is catalogue
    assert log.read().of_base(elsewhere.base).adapters == {}, "nothing of it is live"


def test_pinned_revisions_take_room_in_the_engines_of_their_own_base_model_only(log: CatalogueLog) -> None:
    elsewhere = replace(candidate("french", "1"), base="e" * 64)
    published(log, OLD, elsewhere)

    log.pin(OLD.adapter, most=1)
    assert log.pin(elsewhere.adapter, most=1).pinned == {OLD.adapter, elsewhere.adapter}


def test_history_tells_who_did_what_when_and_why(log: CatalogueLog) -> None:
    published(log, candidate("json", "1"))
    log.stage(OLD, Audit("ci/ann", "nightly"))
    log.abandon(OLD, Audit("ci/ann", "replica 1: no room"))

    number, entry = log.history("pirate")[0]

    assert (number, entry.verb, entry.by, entry.reason) == (4, "abandon", "ci/ann", "replica 1: no room")
    assert [number for number, _ in log.history()] == [4, 3, 2, 1]
    assert [number for number, _ in log.history(limit=1)] == [4]
    revision = log.read().revision(OLD.adapter)
    assert revision is not None
    assert (revision.state, revision.reason) == ("abandoned", "replica 1: no room")


def test_publishing_the_current_revision_again_and_giving_up_leaves_it_current(log: CatalogueLog) -> None:
    published(log, OLD)
    log.stage(OLD)
    abandoned = log.abandon(OLD, Audit("ci", "replica 1 is gone"))

    assert abandoned.resolve(ALIAS) == OLD.adapter
    assert abandoned.staged == frozenset()
