"""The durable truth of which adapters and added pools exist: an append-only log of small entries, and snapshots to
shorten its replay.

    catalogue/0000000001.json, 0000000002.json, …     one entry each, kept for ever as history
    snapshots/0000000128.json                         the state after that many entries

An entry is created under the next number, which fails if the number is taken. So of two writers one fails, reads the
entry of the other, and decides again on the new state. A snapshot only repeats what the entries before it say, so it
may be missing.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

from serve.catalogue.adapter_state import Revision
from serve.catalogue.candidate import Candidate
from serve.catalogue.catalogue import Catalogue
from serve.catalogue.documents import entry_document, read_entry, read_snapshot, snapshot_of
from serve.catalogue.entry import Audit, Entry, PoolEntry
from serve.catalogue.split import Split
from serve.catalogue.storage.object_store import ObjectStore
from serve.errors import PublishFailed, StoreUnavailable, TransitionRefused, UnknownModel
from serve.names import AdapterRevision

SNAPSHOT_EVERY = 128
_REPLAY_BATCH = 256  # entries that are in memory at once
_READS_AT_ONCE = 16  # a read of an object store is mostly waiting
_SNAPSHOTS_KEPT = 2  # the last but one is kept for readers that have listed it and read it next
_NOBODY = Audit()
_ENTRY_NAME = re.compile(r"(\d{10})\.json")

logger = logging.getLogger(__name__)


class CatalogueLog:
    """The log in an object store, which all replicas and writers share. Methods block on the store, so async code calls
    them in a thread. Every method raises StoreUnavailable if the store can't be reached, and StateInvalid if an entry
    is damaged.

    An instance remembers the state that it saw last: entries never change, so no entry is read twice."""

    def __init__(self, objects: ObjectStore) -> None:
        self._objects = objects
        # Threads may replace it by a state that is a little older. That costs the next call some reads, and no more.
        self._known = Catalogue()

    def follow(self, catalogue: Catalogue) -> Catalogue:
        """`catalogue` with every entry that was appended since. If there is none, this costs one read."""
        if self._known.epoch > catalogue.epoch:
            catalogue = self._known
        first = self._read(catalogue.epoch + 1)
        if first is None:
            return catalogue
        if not catalogue.epoch:
            return self.read()
        return self._replay(catalogue.after(first), self._numbers_from(catalogue.epoch + 2))

    def read(self) -> Catalogue:
        """The state now. Costs one listing, and the reads of the entries that this instance doesn't know. The first
        call lists and reads the newest snapshot besides."""
        catalogue = self._known
        numbers = self._numbers_from(catalogue.epoch) if catalogue.epoch else []
        # A file system of other machines may list a little less than it holds, so what is missing is read.
        if catalogue.epoch not in numbers and not (catalogue.epoch and self._read(catalogue.epoch)):
            # Nothing is known yet, or the log was replaced by a shorter one from a backup.
            catalogue = self._load_snapshot()
            numbers = self._numbers_from(catalogue.epoch)
        return self._replay(catalogue, numbers)

    def history(self, name: str | None = None, limit: int = 100) -> list[tuple[int, Entry | PoolEntry]]:
        """The last `limit` entries of one name, or of all, with their numbers; newest first."""
        catalogue = self.read()
        numbers = catalogue.state_of(name).entries if name else range(1, catalogue.epoch + 1)
        newest = numbers[-limit:][::-1] if limit else ()
        return [(number, entry) for number, entry in zip(newest, self._read_all(newest), strict=True) if entry]

    def append(self, decide: Callable[[Catalogue], Entry | PoolEntry | None]) -> Catalogue:
        """Append the entry that `decide` returns for the current state; None appends nothing. If another writer takes
        the number first, `decide` is called again with the new state. Returns the state with the entry, which is
        durable then."""
        catalogue = self.read()
        while (entry := decide(catalogue)) is not None:
            if self._create(catalogue.epoch + 1, entry):
                self._known = catalogue = catalogue.after(entry)
                self._save_snapshot(catalogue)
                return catalogue
            catalogue = self.follow(catalogue)
        return catalogue

    def stage(
        self,
        candidate: Candidate,
        audit: Audit = _NOBODY,
        until: datetime | None = None,
        given_bases: Collection[str] = (),
    ) -> Catalogue:
        """Let all replicas of its base model load a revision. If it is not promoted before `until`, any replica
        abandons it. `given_bases`: of the pools that the server was started with, if it takes others. Raises
        TransitionRefused if its name has revisions for another base model, or if its own has no pool any more."""

        def decide(catalogue: Catalogue) -> Entry:
            if others := catalogue.state_of(candidate.name).live_bases - {candidate.base}:
                raise TransitionRefused(
                    f"The name {candidate.name} belongs to an adapter for another base model, {min(others)[:12]}: "
                    "publish this one under another --name, or retire that one first."
                )
            if given_bases and candidate.base not in {*given_bases, *(pool.base for pool in catalogue.pools.values())}:
                raise TransitionRefused(f"The pool of the base model of {candidate.adapter} was removed meanwhile.")
            if candidate.name in catalogue.pools:
                raise TransitionRefused(f"{candidate.name} is a base model here: publish under another --name.")
            return Entry.now("stage", candidate, audit, until)

        return self.append(decide)

    def promote(self, candidate: Candidate, audit: Audit = _NOBODY) -> Catalogue:
        """Point the alias to a staged revision; nothing happens if it points there already. Raises PublishFailed if the
        revision is not, or no longer, staged."""

        def decide(catalogue: Catalogue) -> Entry | None:
            if candidate.adapter not in catalogue.staged:
                if catalogue.answers_for_its_name(candidate.adapter):
                    return None
                raise PublishFailed(
                    f"{candidate.adapter} is not staged any more: another publish or a retire was faster."
                )
            return Entry.now("promote", candidate, audit)

        return self.append(decide)

    def roll_back(self, candidate: Candidate, audit: Audit = _NOBODY) -> Catalogue:
        """Point the alias to a revision that it pointed to before; nothing happens if it points there already. Raises
        TransitionRefused if it did not point there since the name was last retired."""

        def decide(catalogue: Catalogue) -> Entry | None:
            if catalogue.answers_for_its_name(candidate.adapter):
                return None
            if not catalogue.was_promoted(candidate.adapter):
                raise TransitionRefused(f"{candidate.adapter} never served here: publish or promote it.")
            return Entry.now("rollback", candidate, audit)

        return self.append(decide)

    def abandon(self, candidate: Candidate, audit: Audit, staged_until: datetime | None = None) -> Catalogue:
        """End the staging of a revision. `staged_until`: only the staging that ends then."""

        def decide(catalogue: Catalogue) -> Entry | None:
            revision = catalogue.revision(candidate.adapter)
            if revision is None or not revision.staged or (staged_until and revision.until != staged_until):
                return None
            return Entry.now("abandon", candidate, audit)

        return self.append(decide)

    def split(self, candidate: Candidate, split: Split, audit: Audit = _NOBODY) -> Catalogue:
        """Give a staged revision a share of the traffic. Raises PublishFailed if it is not, or no longer, staged."""

        def decide(catalogue: Catalogue) -> Entry:
            if candidate.adapter not in catalogue.staged:
                raise PublishFailed(f"{candidate.adapter} is not staged any more: a publish or a retire was faster.")
            return Entry.now("split", candidate, audit, split=split)

        return self.append(decide)

    def retire(self, name: str, audit: Audit = _NOBODY) -> Catalogue:
        """Remove the alias and retire its revisions. Raises UnknownModel if the name has no live revision,
        TransitionRefused while one is pinned."""

        def decide(catalogue: Catalogue) -> Entry:
            state = catalogue.state_of(name)
            live = [revision for revision in state.revisions.values() if revision.is_live]
            if not live:
                raise UnknownModel(name, {adapter.name for adapter in catalogue.current})
            if pinned := [str(revision.candidate.adapter) for revision in live if revision.pinned]:
                raise TransitionRefused(f"{', '.join(pinned)} is pinned and so never retired: unpin it first.")
            return Entry.now("retire", (state.current or live[-1]).candidate, audit)

        return self.append(decide)

    def pin(self, adapter: AdapterRevision, most: int, audit: Audit = _NOBODY) -> Catalogue:
        """Keep a revision resident on every replica. Raises TransitionRefused if it is neither promoted nor staged, or
        if more than `most` revisions would be pinned."""

        def decide(catalogue: Catalogue) -> Entry | None:
            revision = _live_revision(catalogue, adapter)
            if revision.pinned:
                return None
            pinned = len(catalogue.of_base(revision.candidate.base).pinned)
            if pinned >= most:
                raise TransitionRefused(
                    f"{pinned} revisions are pinned already, and a replica needs room for others: "
                    "unpin one, or start the server with more room (max_resident_adapters)."
                )
            return Entry.now("pin", revision.candidate, audit)

        return self.append(decide)

    def unpin(self, adapter: AdapterRevision, audit: Audit = _NOBODY) -> Catalogue:
        """Raises TransitionRefused if the revision is neither promoted nor staged."""

        def decide(catalogue: Catalogue) -> Entry | None:
            revision = _live_revision(catalogue, adapter)
            return Entry.now("unpin", revision.candidate, audit) if revision.pinned else None

        return self.append(decide)

    def _replay(self, catalogue: Catalogue, numbers: Iterable[int]) -> Catalogue:
        """`catalogue` with the entries after it, as far as they are among the sorted `numbers`."""
        new = _consecutive(catalogue.epoch + 1, numbers)
        for first in range(0, len(new), _REPLAY_BATCH):
            batch = self._read_all(new[first : first + _REPLAY_BATCH])
            entries = [entry for entry in batch if entry is not None]
            if len(entries) < len(batch):  # deleted since they were listed, which nothing of Graft does
                break
            catalogue = catalogue.after(*entries)
        self._known = catalogue
        return catalogue

    def _numbers_from(self, first: int) -> list[int]:
        """The numbers of the entries from `first` on, sorted."""
        names = self._objects.names("catalogue", after=_entry_name(first - 1) if first else "")
        return [int(match[1]) for name in names if (match := _ENTRY_NAME.fullmatch(name))]

    def _read_all(self, numbers: Sequence[int]) -> list[Entry | PoolEntry | None]:
        if len(numbers) < 2:
            return [self._read(number) for number in numbers]
        with ThreadPoolExecutor(min(_READS_AT_ONCE, len(numbers))) as threads:
            return list(threads.map(self._read, numbers))

    def _read(self, number: int) -> Entry | PoolEntry | None:
        key = _entry_key(number)
        content = self._objects.read(key)
        return None if content is None else read_entry(content, self._objects.locate(key))

    def _create(self, number: int, entry: Entry | PoolEntry) -> bool:
        key = _entry_key(number)
        content = entry_document(entry)
        # An object store client repeats a request whose response was lost: the object that exists may be this entry.
        return self._objects.create(key, content) or self._objects.read(key) == content

    def _load_snapshot(self) -> Catalogue:
        for name in reversed(self._objects.names("snapshots")):
            key = f"snapshots/{name}"
            if (content := self._objects.read(key)) is not None:
                return read_snapshot(content, self._objects.locate(key))
        return Catalogue()

    def _save_snapshot(self, catalogue: Catalogue) -> None:
        if catalogue.epoch % SNAPSHOT_EVERY:
            return
        try:
            self._objects.create(f"snapshots/{catalogue.epoch:010}.json", snapshot_of(catalogue))
            for name in self._objects.names("snapshots")[:-_SNAPSHOTS_KEPT]:
                self._objects.delete(f"snapshots/{name}")
        except StoreUnavailable:
            # The entry is written. Readers replay more entries until the next snapshot.
            logger.warning("could not write the snapshot of epoch %d", catalogue.epoch, exc_info=True)


def _live_revision(catalogue: Catalogue, adapter: AdapterRevision) -> Revision:
    revision = catalogue.revision(adapter)
    if revision is None or not revision.is_live:
        raise TransitionRefused(f"{adapter} is neither published nor staged.")
    return revision


def _consecutive(first: int, numbers: Iterable[int]) -> range:
    """`first` and the numbers that follow it without a gap, as far as they are among the sorted `numbers`. An entry
    that was appended while a store listed the ones after it may be missing."""
    end = first
    for number in numbers:
        end += number == end
    return range(first, end)


def _entry_name(number: int) -> str:
    return f"{number:010}.json"


def _entry_key(number: int) -> str:
    return f"catalogue/{_entry_name(number)}"
