"""The JSON documents in which the admin API shows the catalogue."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from serve.catalogue.adapter_state import AdapterState, Revision
from serve.catalogue.catalogue import Catalogue
from serve.catalogue.entry import Entry, PoolEntry


def adapters_view(catalogue: Catalogue) -> list[dict[str, Any]]:
    """A summary of every name with a revision that serves, served or is staged."""
    return [
        _summary(name, state)
        for name, state in sorted(catalogue.adapters.items())
        if any(revision.is_promoted or revision.staged for revision in state.revisions.values())
    ]


def adapter_view(name: str, state: AdapterState) -> dict[str, Any]:
    """One name with all its revisions, the latest one first."""
    revisions = [revision_view(revision) for revision in reversed(list(state.revisions.values()))]
    split = state.split.model_dump() if state.split else None
    return _summary(name, state) | {"split": split, "revisions": revisions}


def revision_view(revision: Revision) -> dict[str, Any]:
    candidate = revision.candidate
    return {
        "revision": candidate.adapter.engine_name,
        "digest": candidate.revision,
        "state": revision.state,
        "staged": revision.staged,
        "pinned": revision.pinned,
        "reason": revision.reason,
        "by": revision.by,
        "at": revision.at.isoformat(timespec="seconds"),
        "rank": candidate.rank,
        "lineage": asdict(candidate.lineage) if candidate.lineage else None,
    }


def history_view(entries: Iterable[tuple[int, Entry | PoolEntry]]) -> list[dict[str, Any]]:
    """Entries of the catalogue's log with their epochs; `revision` of an entry about a pool is the pool's name."""
    return [
        {
            "epoch": epoch,
            "at": entry.at.isoformat(timespec="seconds"),
            "by": entry.by,
            "verb": entry.verb,
            "revision": entry.pool.name if isinstance(entry, PoolEntry) else entry.candidate.adapter.engine_name,
            "reason": entry.reason,
            "pool": entry.pool if isinstance(entry, Entry) else entry.pool.name,
            "split": entry.split.model_dump() if isinstance(entry, Entry) and entry.split else None,
        }
        for epoch, entry in entries
    ]


def _summary(name: str, state: AdapterState) -> dict[str, Any]:
    revisions = state.revisions.values()
    return {
        "name": name,
        "current": _engine_name(state.current),
        "pool": state.pool,
        "previous": _engine_name(next(iter(state.previous()), None)),
        "staged": [_engine_name(revision) for revision in revisions if revision.staged],
        "pinned": [_engine_name(revision) for revision in revisions if revision.pinned],
    }


def _engine_name(revision: Revision | None) -> str | None:
    return revision.candidate.adapter.engine_name if revision else None
