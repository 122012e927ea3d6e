"""A pure plan from the revisions that are resident in an engine to those that the catalogue asks for."""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass
from itertools import islice

from serve.catalogue.catalogue import Catalogue
from serve.names import AdapterRevision


@dataclass(frozen=True)
class ResidencyPlan:
    """The steps from the revisions that are resident in an engine to those that should be."""

    stage: tuple[AdapterRevision, ...]  # to load and to verify
    load: tuple[AdapterRevision, ...]
    retire: frozenset[AdapterRevision]


def plan_residency(
    catalogue: Catalogue,
    resident: Set[AdapterRevision],
    free: int,
    keep_previous: int = 1,
    unverified: Set[AdapterRevision] = frozenset(),
) -> ResidencyPlan:
    """Plans which revisions to load and which to retire.

    `free` is the number of adapters that can be loaded without an eviction; `unverified` are the resident revisions
    that are still to be verified. Staged and pinned revisions are loaded in any case, because a publish waits for them
    or a pin demands it. Current and previous revisions are loaded only as far as `free` goes, the latest change
    first, because a request would load them anyway. The plan looks at each name of the catalogue once.
    """
    staged = sorted(catalogue.staged - (resident - unverified))
    pinned = sorted(catalogue.pinned - catalogue.staged - resident)
    covered = {*staged, *pinned, *resident}
    optional = (adapter for adapter in _loaded_ahead(catalogue, keep_previous) if adapter not in covered)
    return ResidencyPlan(
        stage=tuple(staged),
        load=(*pinned, *islice(optional, max(0, free - len(staged) - len(pinned)))),
        retire=frozenset(resident - catalogue.needed(keep_previous)),
    )


def _loaded_ahead(catalogue: Catalogue, keep_previous: int) -> Iterator[AdapterRevision]:
    """All current revisions, then all previous ones, each in the order of the latest change."""
    names = list(catalogue.adapters)[::-1]
    for name in names:
        if current := catalogue.adapters[name].current:
            yield current.candidate.adapter
    for name in names:
        for revision in catalogue.adapters[name].previous(keep_previous):
            yield revision.candidate.adapter
