"""The effect of each entry of the log on the state of its name. Pure functions: a replay gives the same state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from serve.catalogue.adapter_state import AdapterState, Revision
from serve.catalogue.entry import Entry


def apply(state: AdapterState, entry: Entry) -> AdapterState:
    """The state of the entry's name once the entry is appended. An entry that no longer applies changes nothing."""
    return _TRANSITIONS[entry.verb](state, entry)


def _stage(state: AdapterState, entry: Entry) -> AdapterState:
    before = state.revisions.get(entry.candidate.revision)
    staged = Revision(
        candidate=entry.candidate,
        state=before.state if before and before.is_promoted else "staged",
        staged=True,
        until=entry.until,
        pinned=before.pinned if before else False,
        at=entry.at,
        by=entry.by,
        reason=entry.reason,
    )
    return _with_revisions(state, staged)


def _promote(state: AdapterState, entry: Entry) -> AdapterState:
    promoted = entry.candidate.revision
    return _point_alias(state, entry, (*(digest for digest in state.line if digest != promoted), promoted))


def _rollback(state: AdapterState, entry: Entry) -> AdapterState:
    target = entry.candidate.revision
    if target not in state.line:
        return _promote(state, entry)
    return _point_alias(state, entry, state.line[: state.line.index(target) + 1])


def _point_alias(state: AdapterState, entry: Entry, line: tuple[str, ...]) -> AdapterState:
    """Point the alias to the end of `line`. The revision that it pointed to becomes a previous one. A split ends,
    because the stable revision that it was compared with is replaced. If the alias pointed to a pool, it does not any
    more."""
    replaced = [_changed(state.current, entry, state="previous")] if state.current else []
    before = state.revisions.get(entry.candidate.revision) or _stage(state, entry).revisions[entry.candidate.revision]
    serving = _changed(before, entry, state="serving", staged=False, until=None)
    return _end_split(replace(_with_revisions(state, *replaced, serving), line=line, pool=None), entry)


def _abandon(state: AdapterState, entry: Entry) -> AdapterState:
    before = state.revisions.get(entry.candidate.revision)
    if before is None or not before.staged:
        return state
    if state.split and state.split.revision == before.candidate.revision:
        state = replace(state, split=None)
    return _unstage(state, before, entry)


def _unstage(state: AdapterState, before: Revision, entry: Entry) -> AdapterState:
    if before.is_promoted:  # it was published again, and keeps its state
        return _with_revisions(state, replace(before, staged=False, until=None))
    abandoned = _changed(before, entry, state="abandoned", staged=False, until=None, pinned=False)
    return _with_revisions(state, abandoned)


def _retire(state: AdapterState, entry: Entry) -> AdapterState:
    """The alias and the revisions behind it go away: a request for one of its revisions is refused too."""
    live = [revision for revision in state.revisions.values() if revision.is_live]
    retired = [_changed(revision, entry, state="retired", staged=False, until=None, pinned=False) for revision in live]
    return replace(_with_revisions(state, *retired), line=(), split=None, pool=None)


def _pin(state: AdapterState, entry: Entry) -> AdapterState:
    return _set_pinned(state, entry, True)


def _unpin(state: AdapterState, entry: Entry) -> AdapterState:
    return _set_pinned(state, entry, False)


def _set_pinned(state: AdapterState, entry: Entry, pinned: bool) -> AdapterState:
    before = state.revisions.get(entry.candidate.revision)
    return _with_revisions(state, _changed(before, entry, pinned=pinned)) if before else state


def _split(state: AdapterState, entry: Entry) -> AdapterState:
    """The revision stays staged for as long as it has a share. Another revision that had a share is abandoned."""
    before = state.revisions.get(entry.candidate.revision)
    if before is None or entry.split is None:
        return state
    if state.split and state.split.revision != entry.split.revision:
        state = _end_split(state, entry)
    return replace(_with_revisions(state, replace(before, staged=True, until=None)), split=entry.split)


def _move(state: AdapterState, entry: Entry) -> AdapterState:
    """A split ends: what it was compared with does not answer any more."""
    return _end_split(replace(state, pool=entry.pool), entry) if state.current else state


def _end_split(state: AdapterState, entry: Entry) -> AdapterState:
    """End the split, if there is one, and the staging of the revision that had a share."""
    if state.split is None:
        return state
    before = state.revisions[state.split.revision]
    state = replace(state, split=None)
    return _unstage(state, before, entry) if before.staged else state


def _changed(revision: Revision, entry: Entry, **changes: Any) -> Revision:
    """The revision with `changes`, and with who made them, when and why."""
    return replace(revision, at=entry.at, by=entry.by, reason=entry.reason, **changes)


def _with_revisions(state: AdapterState, *revisions: Revision) -> AdapterState:
    changed = {revision.candidate.revision: revision for revision in revisions}
    return replace(state, revisions={**state.revisions, **changed})


_TRANSITIONS: dict[str, Callable[[AdapterState, Entry], AdapterState]] = {
    "stage": _stage,
    "promote": _promote,
    "rollback": _rollback,
    "abandon": _abandon,
    "retire": _retire,
    "pin": _pin,
    "unpin": _unpin,
    "split": _split,
    "move": _move,
}
