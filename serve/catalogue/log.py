"""The durable truth of which adapters exist: an append-only log of small entries, and snapshots that bound its replay.

    catalogue/0000000001.json, 0000000002.json, …     one entry each, kept for ever: history
    snapshots/0000000128.json                         the state after that many entries

An entry is created under its number or not at all, so two writers can't both win: the loser decides anew on the
state it lost to. A snapshot says nothing that the entries before it don't say: any writer may make it, none has to.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from serve.candidate import Candidate
from serve.catalogue import AdapterState, Catalogue, Revision
from serve.entry import Cause, Entry
from serve.errors import PublishFailed, StateInvalid, StoreUnavailable, TransitionRefused, UnknownModel
from serve.names import AdapterRevision
from serve.objects import Objects
from serve.split import Split

SNAPSHOT_EVERY = 128
_AT_A_TIME = 256  # entries in memory besides what they make
_SNAPSHOTS_KEPT = 2  # the one before stays for readers that have just listed it
_NOBODY = Cause()
_Document = TypeVar("_Document", bound=BaseModel)

logger = logging.getLogger(__name__)


class _Snapshot(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    epoch: int
    adapters: Mapping[str, AdapterState]


class CatalogueLog:
    """The log in a place that every replica and every writer can reach. All methods wait for that place: call them
    in a thread. All raise StoreUnavailable if it is out of reach."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects

    def follow(self, catalogue: Catalogue) -> Catalogue:
        """`catalogue` with every entry that came since; one look for the next number when there is none."""
        entries = self._entries_after(catalogue.epoch)
        while some := tuple(itertools.islice(entries, _AT_A_TIME)):
            catalogue = catalogue.after(*some)
        return catalogue

    def read(self) -> Catalogue:
        """From the newest snapshot on."""
        return self.follow(self._snapshot())

    def history(self, name: str | None = None, limit: int = 100) -> list[tuple[int, Entry]]:
        """The last entries, of all names or of one, newest first."""
        catalogue = self.read()
        state = catalogue.adapters.get(name, AdapterState()) if name else None
        numbers = state.entries if state else range(1, catalogue.epoch + 1)
        newest = reversed(numbers[-limit:]) if limit else ()
        return [(number, entry) for number in newest if (entry := self._read(number)) is not None]

    def append(self, decide: Callable[[Catalogue], Entry | None]) -> Catalogue:
        """Add the entry that `decide` derives from the state before it; asked anew if another writer was faster.
        None adds nothing. Durable when it returns."""
        catalogue = self.read()
        while (entry := decide(catalogue)) is not None:
            if self._create(catalogue.epoch + 1, entry):
                catalogue = catalogue.after(entry)
                self._save_snapshot(catalogue)
                return catalogue
            catalogue = self.follow(catalogue)
        return catalogue

    def stage(self, candidate: Candidate, cause: Cause = _NOBODY, until: datetime | None = None) -> Catalogue:
        """Have replicas hold it; given up if it is still only staged at `until`."""
        return self.append(lambda _: Entry.now("stage", candidate, cause, until))

    def promote(self, candidate: Candidate, cause: Cause = _NOBODY) -> Catalogue:
        """Point the alias to a staged revision. Raises PublishFailed if it is not, or no longer, staged and not
        what the alias points to already."""

        def decide(catalogue: Catalogue) -> Entry | None:
            if candidate.adapter not in catalogue.staged:
                if candidate.adapter in catalogue.current:
                    return None
                raise PublishFailed(
                    f"{candidate.adapter} is not staged any more: another publish or a retire was faster."
                )
            return Entry.now("promote", candidate, cause)

        return self.append(decide)

    def roll_back(self, candidate: Candidate, cause: Cause = _NOBODY) -> Catalogue:
        """Point the alias to a revision that it pointed to before. Raises TransitionRefused if it never did since
        the name was last retired."""

        def decide(catalogue: Catalogue) -> Entry | None:
            if candidate.adapter in catalogue.current:
                return None
            if not catalogue.was_promoted(candidate.adapter):
                raise TransitionRefused(f"{candidate.adapter} never served here: publish or promote it.")
            return Entry.now("rollback", candidate, cause)

        return self.append(decide)

    def abandon(self, candidate: Candidate, cause: Cause, staged_until: datetime | None = None) -> Catalogue:
        """Give a staged revision up; with `staged_until`, only the staging that has this end."""

        def decide(catalogue: Catalogue) -> Entry | None:
            revision = catalogue.revision(candidate.adapter)
            if revision is None or not revision.staged or (staged_until and revision.until != staged_until):
                return None
            return Entry.now("abandon", candidate, cause)

        return self.append(decide)

    def split(self, candidate: Candidate, split: Split, cause: Cause = _NOBODY) -> Catalogue:
        """Give a staged revision a share. Raises PublishFailed if it is not, or no longer, staged."""

        def decide(catalogue: Catalogue) -> Entry:
            if candidate.adapter not in catalogue.staged:
                raise PublishFailed(f"{candidate.adapter} is not staged any more: a publish or a retire was faster.")
            return Entry.now("split", candidate, cause, split=split)

        return self.append(decide)

    def retire(self, name: str, cause: Cause = _NOBODY) -> Catalogue:
        """Take the alias away. Raises UnknownModel if there is none, TransitionRefused while a revision is pinned."""

        def decide(catalogue: Catalogue) -> Entry:
            state = catalogue.adapters.get(name, AdapterState())
            alive = [it for it in state.revisions.values() if it.is_promoted or it.staged]
            if not alive:
                raise UnknownModel(name, {adapter.name for adapter in catalogue.current})
            if pinned := [str(it.candidate.adapter) for it in alive if it.pinned]:
                raise TransitionRefused(f"{', '.join(pinned)} is pinned and so never retired: unpin it first.")
            return Entry.now("retire", (state.current or alive[-1]).candidate, cause)

        return self.append(decide)

    def pin(self, adapter: AdapterRevision, most: int, cause: Cause = _NOBODY) -> Catalogue:
        """Keep it resident everywhere. Raises TransitionRefused if it is neither promoted nor staged, or if more
        than `most` revisions would be pinned."""

        def decide(catalogue: Catalogue) -> Entry | None:
            revision = _living(catalogue, adapter)
            if revision.pinned:
                return None
            if len(catalogue.pinned) >= most:
                raise TransitionRefused(
                    f"{len(catalogue.pinned)} revisions are pinned already, and a replica needs room for others: "
                    "unpin one, or start the server with more room (max_resident_adapters)."
                )
            return Entry.now("pin", revision.candidate, cause)

        return self.append(decide)

    def unpin(self, adapter: AdapterRevision, cause: Cause = _NOBODY) -> Catalogue:
        def decide(catalogue: Catalogue) -> Entry | None:
            revision = _living(catalogue, adapter)
            return Entry.now("unpin", revision.candidate, cause) if revision.pinned else None

        return self.append(decide)

    def _entries_after(self, epoch: int) -> Iterator[Entry]:
        while (entry := self._read(epoch + 1)) is not None:
            yield entry
            epoch += 1

    def _read(self, number: int) -> Entry | None:
        key = _entry_key(number)
        content = self._objects.read(key)
        return None if content is None else _parsed(Entry, content, self._objects.locate(key))

    def _create(self, number: int, entry: Entry) -> bool:
        key = _entry_key(number)
        content = entry.model_dump_json().encode()
        # An object store repeats a request whose answer was lost: what is there may be this very entry.
        return self._objects.create(key, content) or self._objects.read(key) == content

    def _snapshot(self) -> Catalogue:
        for name in reversed(self._objects.names("snapshots")):
            key = f"snapshots/{name}"
            if (content := self._objects.read(key)) is not None:
                snapshot = _parsed(_Snapshot, content, self._objects.locate(key))
                return Catalogue(snapshot.epoch, snapshot.adapters)
        return Catalogue()

    def _save_snapshot(self, catalogue: Catalogue) -> None:
        if catalogue.epoch % SNAPSHOT_EVERY:
            return
        snapshot = _Snapshot(epoch=catalogue.epoch, adapters=catalogue.adapters)
        try:
            self._objects.create(f"snapshots/{catalogue.epoch:010}.json", snapshot.model_dump_json().encode())
            for name in self._objects.names("snapshots")[:-_SNAPSHOTS_KEPT]:
                self._objects.delete(f"snapshots/{name}")
        except StoreUnavailable:
            # The entry is written: readers replay more until the next snapshot.
            logger.warning("could not write the snapshot of epoch %d", catalogue.epoch, exc_info=True)


def _living(catalogue: Catalogue, adapter: AdapterRevision) -> Revision:
    revision = catalogue.revision(adapter)
    if revision is None or not (revision.is_promoted or revision.staged):
        raise TransitionRefused(f"{adapter} is neither published nor staged.")
    return revision


def _entry_key(number: int) -> str:
    return f"catalogue/{number:010}.json"


def _parsed(kind: type[_Document], content: bytes, place: str) -> _Document:
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        raise StateInvalid(
            f"The catalogue entry {place} can't be read: {error}. "
            "Restore it from a backup, or start with a new --state directory and publish again."
        ) from error
