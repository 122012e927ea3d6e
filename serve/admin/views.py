"""What the admin API shows of the catalogue: plain documents."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from serve.catalogue import AdapterState, Catalogue, Revision
from serve.entry import Entry


def listed(catalogue: Catalogue) -> list[dict[str, Any]]:
    """Every name that serves or is staged, each with what it means now."""
    states = ((name, state) for name, state in sorted(catalogue.adapters.items()))
    return [_summary(name, state) for name, state in states if any(_is_alive(it) for it in state.revisions.values())]


def shown(name: str, state: AdapterState) -> dict[str, Any]:
    """One name with all its revisions, latest first."""
    revisions = [revision_view(it) for it in reversed(state.revisions.values())]  # type: ignore[call-overload]
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


def told(entries: Iterable[tuple[int, Entry]]) -> list[dict[str, Any]]:
    """History as it was written."""
    return [
        {
            "epoch": number,
            "at": entry.at.isoformat(timespec="seconds"),
            "by": entry.by,
            "verb": entry.verb,
            "revision": entry.candidate.adapter.engine_name,
            "reason": entry.reason,
            "split": entry.split.model_dump() if entry.split else None,
        }
        for number, entry in entries
    ]


def _summary(name: str, state: AdapterState) -> dict[str, Any]:
    revisions = state.revisions.values()
    return {
        "name": name,
        "current": _name(state.current),
        "previous": _name(next(iter(state.previous()), None)),
        "staged": [_name(it) for it in revisions if it.staged],
        "pinned": [_name(it) for it in revisions if it.pinned],
    }


def _name(revision: Revision | None) -> str | None:
    return revision.candidate.adapter.engine_name if revision else None


def _is_alive(revision: Revision) -> bool:
    return revision.is_promoted or revision.staged
