from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.candidate import Candidate
from serve.catalogue import Catalogue
from serve.entry import Cause, Entry
from serve.errors import PublishFailed, StateInvalid, StoreUnavailable, TransitionRefused, UnknownModel
from serve.log import SNAPSHOT_EVERY, CatalogueLog
from serve.names import RequestedModel
from serve.objects import Directory
from tests.serve.conftest import candidate

ALIAS = RequestedModel("pirate")
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


def published(log: CatalogueLog, *candidates: Candidate) -> Catalogue:
    for each in candidates:
        log.stage(each)
        log.promote(each)
    return log.read()


def test_a_rollback_goes_back_step_by_step_and_never_to_what_was_rolled_back_from(log: CatalogueLog) -> None:
    first, second, third = (candidate("pirate", number) for number in "123")
    published(log, first, second, third)

    assert log.roll_back(second).resolve(ALIAS) == second.adapter
    assert [it.candidate for it in log.read().adapters["pirate"].previous(9)] == [first]
    assert log.roll_back(first).adapters["pirate"].previous(9) == ()
    newest = published(log, candidate("pirate", "4"))
    assert [it.candidate for it in newest.adapters["pirate"].previous(9)] == [first]
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

    assert log.read().wanted == tuple(sorted((OLD, NEW), key=lambda it: it.adapter))
    with pytest.raises(TransitionRefused, match="is pinned"):
        log.retire("pirate")
    with pytest.raises(TransitionRefused, match="unpin one"):
        log.pin(NEW.adapter, most=1)
    log.unpin(OLD.adapter)
    assert log.retire("pirate").pinned == frozenset()


def test_history_tells_who_did_what_when_and_why(log: CatalogueLog) -> None:
    published(log, candidate("json", "1"))
    log.stage(OLD, Cause("ci/ann", "nightly"))
    log.abandon(OLD, Cause("ci/ann", "replica 1: no room"))

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
    abandoned = log.abandon(OLD, Cause("ci", "replica 1 is gone"))

    assert abandoned.resolve(ALIAS) == OLD.adapter
    assert abandoned.staged == frozenset()


def test_a_reader_starts_from_the_newest_snapshot(log: CatalogueLog, tmp_path: Path) -> None:
    for number in range(SNAPSHOT_EVERY):
        published(log, candidate(f"adapter-{number}", "1"))
    snapshots = sorted((tmp_path / "snapshots").iterdir())
    assert [it.name for it in snapshots] == [f"{number * SNAPSHOT_EVERY:010}.json" for number in (1, 2)]
    replayed = CatalogueLog(Directory(tmp_path)).follow(Catalogue())

    for entry in (tmp_path / "catalogue").iterdir():
        if int(entry.stem) <= 2 * SNAPSHOT_EVERY - 1:
            entry.unlink()

    assert log.read() == replayed
    assert len(published(log, OLD).current) == SNAPSHOT_EVERY + 1


class NoSnapshots(Directory):
    def create(self, key: str, content: bytes) -> bool:
        if key.startswith("snapshots/"):
            raise StoreUnavailable("no room")
        return super().create(key, content)


def test_a_snapshot_that_could_not_be_written_costs_only_a_longer_replay(tmp_path: Path) -> None:
    log = CatalogueLog(NoSnapshots(tmp_path))
    states = [log.stage(candidate(f"adapter-{number}", "1")) for number in range(SNAPSHOT_EVERY)]

    assert log.read() == states[-1]
    assert log.history(limit=1)[0][0] == SNAPSHOT_EVERY


class LostAnswer(Directory):
    """Writes, but tells that something was there: an object store whose first answer was lost."""

    def create(self, key: str, content: bytes) -> bool:
        super().create(key, content)
        return False


def test_a_writer_whose_answer_was_lost_knows_its_own_entry(tmp_path: Path) -> None:
    log = CatalogueLog(LostAnswer(tmp_path))
    log.stage(OLD)

    assert log.promote(OLD).epoch == 2


STEPS = ("stage", "promote", "roll_back", "abandon", "retire", "pin", "unpin")


def take(log: CatalogueLog, step: str, each: Candidate) -> bool:
    """Whether the step was allowed."""
    by_step: dict[str, Callable[[], object]] = {
        "stage": lambda: log.stage(each),
        "promote": lambda: log.promote(each),
        "roll_back": lambda: log.roll_back(each),
        "abandon": lambda: log.abandon(each, Cause()),
        "retire": lambda: log.retire(each.name),
        "pin": lambda: log.pin(each.adapter, 2),
        "unpin": lambda: log.unpin(each.adapter),
    }
    try:
        by_step[step]()
    except (PublishFailed, TransitionRefused, UnknownModel):
        return False
    return True


class Raced(Directory):
    """Before it writes, another writer takes its next steps."""

    def __init__(self, root: Path, others: list[tuple[str, Candidate]]) -> None:
        super().__init__(root)
        self._other = CatalogueLog(Directory(root))
        self._others = others

    def create(self, key: str, content: bytes) -> bool:
        if self._others:
            take(self._other, *self._others.pop(0))
        return super().create(key, content)


steps = st.lists(st.tuples(st.sampled_from(STEPS), st.sampled_from([OLD, NEW, candidate("json", "1")])), max_size=12)


@given(mine=steps, others=steps)
@settings(max_examples=150)
def test_no_interleaving_of_two_writers_loses_or_misplaces_an_entry(
    mine: list[tuple[str, Candidate]], others: list[tuple[str, Candidate]]
) -> None:
    with tempfile.TemporaryDirectory() as root:
        log = CatalogueLog(Raced(Path(root), list(others)))
        for step, each in mine:
            take(log, step, each)
        state = Catalogue()
        for _, entry in reversed(log.history(limit=1000)):
            assert_allowed(state, entry)
            state = state.after(entry)
        assert state == log.read()
        for name, adapter in state.adapters.items():
            serving = [it for it in adapter.revisions.values() if it.state == "serving"]
            assert [it.candidate for it in serving] == ([adapter.current.candidate] if adapter.current else []), name


def assert_allowed(state: Catalogue, entry: Entry) -> None:
    """What each step promises of the state that it was decided on."""
    adapter, before = entry.candidate.adapter, state.revision(entry.candidate.adapter)
    if entry.verb in ("promote", "abandon"):
        assert adapter in state.staged
    elif entry.verb == "rollback":
        assert state.was_promoted(adapter)
        assert adapter not in state.current
    elif entry.verb == "retire":
        assert not any(it.name == adapter.name for it in state.pinned)
    elif entry.verb in ("pin", "unpin"):
        assert before is not None
        assert before.pinned == (entry.verb == "unpin")


def test_a_writer_killed_at_any_step_leaves_a_catalogue_that_the_next_one_goes_on_with(tmp_path: Path) -> None:
    """A child is killed at the first line it executes below `serve`, then at the second, and so on until it gets
    through: every state that a `kill -9` can leave behind."""
    for survived in range(1, 10_000):
        root = tmp_path / str(survived)
        log = CatalogueLog(Directory(root))
        if run_until_line(survived, lambda root=root: published(CatalogueLog(Directory(root)), OLD)):  # type: ignore[misc]
            break
        state = log.read()
        assert state.resolve(ALIAS) in (None, OLD.adapter)
        assert [number for number, _ in log.history()] == list(range(state.epoch, 0, -1))
        assert published(log, OLD).resolve(ALIAS) == OLD.adapter
    assert survived > 100, "the steps were not seen"


def run_until_line(count: int, work: Callable[[], object]) -> bool:
    """Do the work in a child that is killed when it comes to its `count`th line; whether it came to its end."""
    child = os.fork()
    if child == 0:
        left = count

        def trace(frame: FrameType, event: str, _: object) -> Any:
            nonlocal left
            if "/serve/" not in frame.f_code.co_filename:
                return None
            if event == "line":
                left -= 1
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)
            return trace

        sys.settrace(trace)
        work()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return not os.WIFSIGNALED(status)
