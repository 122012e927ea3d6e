from __future__ import annotations

import threading
from pathlib import Path

import pytest

from serve.catalogue import Catalogue
from serve.entry import Cause
from serve.errors import PublishFailed, StateInvalid, UnknownModel
from serve.log import CatalogueLog
from serve.names import RequestedModel
from serve.objects import Directory
from tests.serve.conftest import candidate

OLD, NEW = candidate("pirate", "old"), candidate("pirate", "new")


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
    log.abandon(OLD, Cause("ci", "replica 1 could not load it"))

    with pytest.raises(PublishFailed, match="not staged any more"):
        log.promote(OLD)


def test_an_abandoned_revision_is_neither_reachable_nor_counted_as_published(log: CatalogueLog) -> None:
    log.stage(OLD)
    pin = RequestedModel("pirate", OLD.revision[:12])
    assert log.read().resolve(pin) == OLD.adapter

    log.abandon(OLD, Cause("ci", "replica 1 could not load it"))

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


def test_following_continues_where_the_reader_stood(log: CatalogueLog) -> None:
    log.stage(OLD)
    seen = log.read()
    log.promote(OLD)

    assert log.follow(seen) == log.read()


def test_concurrent_writers_lose_no_entry(tmp_path: Path) -> None:
    adapters = [candidate(f"adapter-{number}", "weights") for number in range(40)]

    def write(mine: slice) -> None:
        log = CatalogueLog(Directory(tmp_path))
        for adapter in adapters[mine]:
            log.stage(adapter)

    writers = [threading.Thread(target=write, args=(slice(first, None, 4),)) for first in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()

    catalogue = CatalogueLog(Directory(tmp_path)).read()
    assert catalogue.staged == {it.adapter for it in adapters}
    assert catalogue.epoch == len(adapters)


def test_a_writer_that_died_before_its_entry_was_complete_leaves_nothing_to_read(tmp_path: Path) -> None:
    (tmp_path / ".entry-half").write_text('{"verb": "sta')

    log = CatalogueLog(Directory(tmp_path))
    log.stage(OLD)

    assert log.read().staged == {OLD.adapter}


def test_a_damaged_entry_is_told_with_its_path(log: CatalogueLog, tmp_path: Path) -> None:
    log.stage(OLD)
    entry = tmp_path / "catalogue" / "0000000001.json"
    entry.write_text("{}")

    with pytest.raises(StateInvalid, match=str(entry)):
        log.read()


def test_a_catalogue_knows_what_its_server_must_be_able_to_hold(log: CatalogueLog) -> None:
    for it in (OLD, NEW):
        log.stage(it)
        log.promote(it)
    other = candidate("json", "1")
    log.stage(other)

    assert log.read().wanted == (other, NEW)
