"""Writers of the log that race, fail or die, and its snapshots."""

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

from serve.catalogue.candidate import Candidate
from serve.catalogue.catalogue import Catalogue
from serve.catalogue.entry import Audit, Entry
from serve.catalogue.log import SNAPSHOT_EVERY, CatalogueLog
from serve.catalogue.storage.object_store import DirectoryStore
from serve.errors import PublishFailed, StateInvalid, StoreUnavailable, TransitionRefused, UnknownModel
from serve.names import RequestedModel
from tests.serve.catalogue.publishing import NEW, OLD, published
from tests.serve.conftest import candidate

ALIAS = RequestedModel("pirate")


def test_following_continues_where_the_reader_stood(log: CatalogueLog) -> None:
    log.stage(OLD)
    seen = log.read()
    log.promote(OLD)

    assert log.follow(seen) == log.read()


def test_concurrent_writers_lose_no_entry(tmp_path: Path) -> None:
    adapters = [candidate(f"adapter-{number}", "weights") for number in range(40)]

    def write(part: slice) -> None:
        log = CatalogueLog(DirectoryStore(tmp_path))
        for adapter in adapters[part]:
            log.stage(adapter)

    writers = [threading.Thread(target=write, args=(slice(first, None, 4),)) for first in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()

    catalogue = CatalogueLog(DirectoryStore(tmp_path)).read()
    assert catalogue.staged == {adapter.adapter for adapter in adapters}
    assert catalogue.epoch == len(adapters)


def test_a_writer_that_died_before_its_entry_was_complete_leaves_nothing_to_read(tmp_path: Path) -> None:
    (tmp_path / ".entry-half").write_text('{"verb": "sta')

    log = CatalogueLog(DirectoryStore(tmp_path))
    log.stage(OLD)

    assert log.read().staged == {OLD.adapter}


def test_a_damaged_entry_is_reported_with_its_path(log: CatalogueLog, tmp_path: Path) -> None:
    log.stage(OLD)
    entry = tmp_path / "catalogue" / "0000000001.json"
    entry.write_text("{}")

    with pytest.raises(StateInvalid, match=str(entry)):
        CatalogueLog(DirectoryStore(tmp_path)).read()


def test_a_reader_starts_from_the_newest_snapshot(log: CatalogueLog, tmp_path: Path) -> None:
    for number in range(SNAPSHOT_EVERY):
        published(log, candidate(f"adapter-{number}", "1"))
    snapshots = sorted((tmp_path / "snapshots").iterdir())
    assert [snapshot.name for snapshot in snapshots] == [f"{number * SNAPSHOT_EVERY:010}.json" for number in (1, 2)]
    replayed = Catalogue().after(*(entry for _, entry in reversed(log.history(limit=1000))))

    for entry in (tmp_path / "catalogue").iterdir():
        if int(entry.stem) <= 2 * SNAPSHOT_EVERY - 1:
            entry.unlink()

    restarted = CatalogueLog(DirectoryStore(tmp_path))
    assert restarted.read() == replayed
    assert len(published(restarted, OLD).current) == SNAPSHOT_EVERY + 1


class NoSnapshots(DirectoryStore):
    def create(self, key: str, content: bytes) -> bool:
        if key.startswith("snapshots/"):
            raise StoreUnavailable("no room")
        return super().create(key, content)


def test_a_snapshot_that_could_not_be_written_costs_only_a_longer_replay(tmp_path: Path) -> None:
    log = CatalogueLog(NoSnapshots(tmp_path))
    states = [log.stage(candidate(f"adapter-{number}", "1")) for number in range(SNAPSHOT_EVERY)]

    assert CatalogueLog(DirectoryStore(tmp_path)).read() == states[-1]
    assert log.history(limit=1)[0][0] == SNAPSHOT_EVERY


def test_a_log_that_was_restored_from_an_older_backup_is_read_as_it_is(log: CatalogueLog, tmp_path: Path) -> None:
    backup = published(log, OLD)
    published(log, NEW)
    for number in (3, 4):
        (tmp_path / "catalogue" / f"{number:010}.json").unlink()

    assert log.read() == backup
    assert log.stage(NEW).epoch == 3


class Overtaken(DirectoryStore):
    """Lists the entries before the last one was written, as a file system of other machines may for some seconds."""

    def names(self, prefix: str, after: str = "") -> list[str]:
        return super().names(prefix, after)[:-1]


def test_a_listing_that_is_late_takes_back_nothing_that_is_known(tmp_path: Path) -> None:
    log = CatalogueLog(Overtaken(tmp_path))
    published(log, OLD)

    assert log.read().resolve(ALIAS) == OLD.adapter


class LostAnswer(DirectoryStore):
    """Creates the object, but says that it existed: an object store whose first response was lost."""

    def create(self, key: str, content: bytes) -> bool:
        super().create(key, content)
        return False


def test_a_writer_whose_answer_was_lost_knows_its_own_entry(tmp_path: Path) -> None:
    log = CatalogueLog(LostAnswer(tmp_path))
    log.stage(OLD)

    assert log.promote(OLD).epoch == 2


STEPS = ("stage", "promote", "roll_back", "abandon", "retire", "pin", "unpin")


def take(log: CatalogueLog, step: str, each: Candidate) -> bool:
    """Do the step; whether it was allowed."""
    by_step: dict[str, Callable[[], object]] = {
        "stage": lambda: log.stage(each),
        "promote": lambda: log.promote(each),
        "roll_back": lambda: log.roll_back(each),
        "abandon": lambda: log.abandon(each, Audit()),
        "retire": lambda: log.retire(each.name),
        "pin": lambda: log.pin(each.adapter, 2),
        "unpin": lambda: log.unpin(each.adapter),
    }
    try:
        by_step[step]()
    except (PublishFailed, TransitionRefused, UnknownModel):
        return False
    return True


class Raced(DirectoryStore):
    """Before each write another writer does its next step."""

    def __init__(self, root: Path, others: list[tuple[str, Candidate]]) -> None:
        super().__init__(root)
        self._other = CatalogueLog(DirectoryStore(root))
        self._others = others

    def create(self, key: str, content: bytes) -> bool:
        if self._others:
            take(self._other, *self._others.pop(0))
        return super().create(key, content)


steps = st.lists(st.tuples(st.sampled_from(STEPS), st.sampled_from([OLD, NEW, candidate("json", "1")])), max_size=12)


@given(ours=steps, others=steps)
@settings(max_examples=150)
def test_no_interleaving_of_two_writers_loses_or_misplaces_an_entry(
    ours: list[tuple[str, Candidate]], others: list[tuple[str, Candidate]]
) -> None:
    with tempfile.TemporaryDirectory() as root:
        log = CatalogueLog(Raced(Path(root), list(others)))
        for step, each in ours:
            take(log, step, each)
        state = Catalogue()
        for _, entry in reversed(log.history(limit=1000)):
            assert_allowed(state, entry)
            state = state.after(entry)
        assert state == log.read() == CatalogueLog(DirectoryStore(Path(root))).read()
        for name, adapter in state.adapters.items():
            serving = [revision for revision in adapter.revisions.values() if revision.state == "serving"]
            assert [revision.candidate for revision in serving] == (
                [adapter.current.candidate] if adapter.current else []
            ), name


def assert_allowed(state: Catalogue, entry: Entry) -> None:
    """Check that the step was allowed in the state before it."""
    adapter, before = entry.candidate.adapter, state.revision(entry.candidate.adapter)
    if entry.verb in ("promote", "abandon"):
        assert adapter in state.staged
    elif entry.verb == "rollback":
        assert state.was_promoted(adapter)
        assert adapter not in state.current
    elif entry.verb == "retire":
        assert not any(pinned.name == adapter.name for pinned in state.pinned)
    elif entry.verb in ("pin", "unpin"):
        assert before is not None
        assert before.pinned == (entry.verb == "unpin")


def test_a_writer_killed_at_any_step_leaves_a_catalogue_that_the_next_one_goes_on_with(tmp_path: Path) -> None:
    """A child process is killed at the first line that it executes in `serve`, another one at the second, and so on
    until one ends by itself. So every state that a `kill -9` can leave is seen."""
    for survived in range(1, 10_000):
        root = tmp_path / str(survived)
        log = CatalogueLog(DirectoryStore(root))
        if run_until_line(survived, lambda root=root: published(CatalogueLog(DirectoryStore(root)), OLD)):  # type: ignore[misc]
            break
        state = log.read()
        assert state.resolve(ALIAS) in (None, OLD.adapter)
        assert [number for number, _ in log.history()] == list(range(state.epoch, 0, -1))
        assert published(log, OLD).resolve(ALIAS) == OLD.adapter
    assert survived > 100, "the steps were not seen"


def run_until_line(count: int, work: Callable[[], object]) -> bool:
    """Do the work in a child process that is killed at its `count`th line; whether it ended by itself."""
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
