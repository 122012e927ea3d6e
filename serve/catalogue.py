"""What the catalogue says at one moment: every name, its revisions and their states. Pure values; `serve.log`
reads and writes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict

from serve.candidate import Candidate
from serve.entry import Entry
from serve.names import SHORT_REVISION, AdapterRevision, RequestedModel
from serve.split import Split

State = Literal["staged", "serving", "previous", "abandoned", "retired"]

# Read from snapshots by pydantic, but none of its models: of those one alone takes a kilobyte, and every replica holds
# thousands.
_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, slots=True, kw_only=True)
class Revision:
    """One revision of one name, and what last happened to it."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    candidate: Candidate
    state: State
    staged: bool  # replicas shall hold it; true for a serving one that is published again, too
    until: datetime | None = None
    pinned: bool = False
    at: datetime
    by: str = ""
    reason: str = ""

    @property
    def is_promoted(self) -> bool:
        return self.state in ("serving", "previous")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterState:
    """One name."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    revisions: Mapping[str, Revision] = field(default_factory=dict)  # by digest, oldest first
    line: tuple[str, ...] = ()  # the revisions that led to the current one, which is the last
    entries: tuple[int, ...] = ()  # numbers of the log entries about this name
    split: Split | None = None  # the staged revision that gets a share of the traffic

    @property
    def current(self) -> Revision | None:
        return self.revisions[self.line[-1]] if self.line else None

    def previous(self, count: int = 1) -> tuple[Revision, ...]:
        """What the alias pointed to before, latest first, at most `count`. What was rolled back from is not
        among them: going back never leads to it."""
        return tuple(self.revisions[it] for it in reversed(self.line[:-1]))[:count]

    def find(self, revision: str) -> Revision | None:
        """The revision whose digest begins so; None if there is none, or it is too short to tell."""
        if len(revision) < SHORT_REVISION:
            return None
        return next((it for digest, it in self.revisions.items() if digest.startswith(revision)), None)


@dataclass(frozen=True)
class Catalogue:
    """The state after `epoch` entries. A value: following the log makes a new one."""

    epoch: int = 0
    adapters: Mapping[str, AdapterState] = field(default_factory=dict)  # what changed last is last

    @cached_property
    def current(self) -> frozenset[AdapterRevision]:
        return frozenset(it.current.candidate.adapter for it in self.adapters.values() if it.current)

    @cached_property
    def staged(self) -> frozenset[AdapterRevision]:
        return self._those(lambda revision: revision.staged)

    @cached_property
    def pinned(self) -> frozenset[AdapterRevision]:
        return self._those(lambda revision: revision.pinned)

    @property
    def wanted(self) -> tuple[Candidate, ...]:
        """What a server of this catalogue must be able to hold."""
        return tuple(self.candidate(adapter) for adapter in sorted(self.current | self.staged | self.pinned))

    def revision(self, adapter: AdapterRevision) -> Revision | None:
        return self.adapters.get(adapter.name, AdapterState()).revisions.get(adapter.revision)

    def candidate(self, adapter: AdapterRevision) -> Candidate:
        return self.adapters[adapter.name].revisions[adapter.revision].candidate

    def resolve(self, requested: RequestedModel) -> AdapterRevision | None:
        """The revision an alias points to, or the one that was asked for; None if there is no such adapter."""
        state = self.adapters.get(requested.name, AdapterState())
        found = state.current if requested.revision is None else state.find(requested.revision)
        return found.candidate.adapter if found and (found.is_promoted or found.staged) else None

    def split_of(self, name: str) -> Split | None:
        return self.adapters.get(name, AdapterState()).split

    def was_promoted(self, adapter: AdapterRevision) -> bool:
        revision = self.revision(adapter)
        return revision is not None and revision.is_promoted

    def overdue(self, now: datetime) -> tuple[Revision, ...]:
        """Staged revisions whose publish never came to an end: its coordinator died."""
        found = (self.revision(adapter) for adapter in sorted(self.staged))
        return tuple(it for it in found if it and it.until and it.until < now)

    def after(self, *entries: Entry) -> Catalogue:
        """The state when `entries` follow."""
        adapters = dict(self.adapters)
        for number, entry in enumerate(entries, self.epoch + 1):
            name = entry.candidate.name
            state = _FOLD[entry.verb](adapters.pop(name, AdapterState()), entry)
            adapters[name] = replace(state, entries=(*state.entries, number))
        return Catalogue(self.epoch + len(entries), adapters)

    def _those(self, condition: Callable[[Revision], bool]) -> frozenset[AdapterRevision]:
        revisions = (it for state in self.adapters.values() for it in state.revisions.values())
        return frozenset(it.candidate.adapter for it in revisions if condition(it))


def _stage(state: AdapterState, entry: Entry) -> AdapterState:
    before = state.revisions.get(entry.candidate.revision)
    promoted = before is not None and before.is_promoted
    staged = Revision(
        candidate=entry.candidate,
        state=before.state if before and promoted else "staged",
        staged=True,
        until=entry.until,
        pinned=before.pinned if before else False,
        at=entry.at,
        by=entry.by,
        reason=entry.reason,
    )
    return _with(state, [staged])


def _promote(state: AdapterState, entry: Entry) -> AdapterState:
    digest = entry.candidate.revision
    return _pointing(state, entry, (*(it for it in state.line if it != digest), digest))


def _rollback(state: AdapterState, entry: Entry) -> AdapterState:
    digest = entry.candidate.revision
    if digest not in state.line:
        return _promote(state, entry)
    return _pointing(state, entry, state.line[: state.line.index(digest) + 1])


def _pointing(state: AdapterState, entry: Entry, line: tuple[str, ...]) -> AdapterState:
    """The alias at the end of `line`; what it pointed to before is previous, for the entry's reason."""
    left = [_told(state.current, entry, state="previous")] if state.current else []
    before = state.revisions.get(entry.candidate.revision) or _stage(state, entry).revisions[entry.candidate.revision]
    entered = _told(before, entry, state="serving", staged=False, until=None)
    moved = replace(_with(state, [*left, entered]), line=line)
    return _without_split(moved, entry)  # what it was compared with is not there any more


def _abandon(state: AdapterState, entry: Entry) -> AdapterState:
    before = state.revisions.get(entry.candidate.revision)
    if before is None or not before.staged:
        return state
    if state.split and state.split.revision == before.candidate.revision:
        state = replace(state, split=None)
    return _unstaged(state, before, entry)


def _unstaged(state: AdapterState, before: Revision, entry: Entry) -> AdapterState:
    if before.is_promoted:  # it was being published again: it stays what it is
        return _with(state, [replace(before, staged=False, until=None)])
    return _with(state, [_told(before, entry, state="abandoned", staged=False, until=None, pinned=False)])


def _retire(state: AdapterState, entry: Entry) -> AdapterState:
    alive = [it for it in state.revisions.values() if it.is_promoted or it.staged]
    ended = [_told(it, entry, state="retired", staged=False, until=None, pinned=False) for it in alive]
    return replace(_with(state, ended), line=(), split=None)  # requests for a revision of it end as well


def _pin(state: AdapterState, entry: Entry) -> AdapterState:
    return _pinned(state, entry, True)


def _unpin(state: AdapterState, entry: Entry) -> AdapterState:
    return _pinned(state, entry, False)


def _pinned(state: AdapterState, entry: Entry, pinned: bool) -> AdapterState:
    before = state.revisions.get(entry.candidate.revision)
    return _with(state, [_told(before, entry, pinned=pinned)]) if before else state


def _split(state: AdapterState, entry: Entry) -> AdapterState:
    """It is staged for as long as it has its share; another one that had one is given up."""
    before = state.revisions.get(entry.candidate.revision)
    if before is None or entry.split is None:
        return state
    if state.split and state.split.revision != entry.split.revision:
        state = _without_split(state, entry)
    staged = replace(before, staged=True, until=None)
    return replace(_with(state, [staged]), split=entry.split)


def _without_split(state: AdapterState, entry: Entry) -> AdapterState:
    """The split ends, and the revision that had a share isn't held for it any longer."""
    if state.split is None:
        return state
    before = state.revisions[state.split.revision]
    state = replace(state, split=None)
    return _unstaged(state, before, entry) if before.staged else state


def _told(revision: Revision, entry: Entry, **changes: Any) -> Revision:
    return replace(revision, at=entry.at, by=entry.by, reason=entry.reason, **changes)


def _with(state: AdapterState, revisions: Iterable[Revision]) -> AdapterState:
    changed = {it.candidate.revision: it for it in revisions}
    return replace(state, revisions={**state.revisions, **changed})


_FOLD: dict[str, Callable[[AdapterState, Entry], AdapterState]] = {
    "stage": _stage,
    "promote": _promote,
    "rollback": _rollback,
    "abandon": _abandon,
    "retire": _retire,
    "pin": _pin,
    "unpin": _unpin,
    "split": _split,
}
