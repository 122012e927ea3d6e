"""The state of the catalogue at one moment, as a value; `serve.catalogue.log` reads and writes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property

from serve.catalogue.adapter_state import AdapterState, Revision
from serve.catalogue.added_pool import AddedPool
from serve.catalogue.candidate import Candidate
from serve.catalogue.entry import Entry, PoolEntry
from serve.catalogue.split import Split
from serve.catalogue.transitions import apply
from serve.names import AdapterRevision, RequestedModel


@dataclass(frozen=True)
class Catalogue:
    """Every name and its revisions, and the pools that were added, after the first `epoch` entries of the log.
    Immutable."""

    epoch: int = 0
    adapters: Mapping[str, AdapterState] = field(default_factory=dict)  # by name; the last one changed is last
    pools: Mapping[str, AddedPool] = field(default_factory=dict)  # by name; the same object until one is changed

    @cached_property
    def current(self) -> frozenset[AdapterRevision]:
        """The revisions that aliases point to."""
        return frozenset(state.current.candidate.adapter for state in self.adapters.values() if state.current)

    @cached_property
    def staged(self) -> frozenset[AdapterRevision]:
        return self._where(lambda revision: revision.staged)

    @cached_property
    def pinned(self) -> frozenset[AdapterRevision]:
        return self._where(lambda revision: revision.pinned)

    @property
    def wanted(self) -> tuple[Candidate, ...]:
        """The candidates that a server of this catalogue must be able to hold."""
        return tuple(self.candidate(adapter) for adapter in sorted(self.current | self.staged | self.pinned))

    def needed(self, keep_previous: int) -> frozenset[AdapterRevision]:
        """The revisions that are staged or pinned, that an alias points to, or that it pointed to before: the last
        `keep_previous` of each name."""
        states = self.adapters.values()
        previous = (revision for state in states for revision in state.previous(keep_previous))
        return self.current | self.staged | self.pinned | {revision.candidate.adapter for revision in previous}

    def state_of(self, name: str) -> AdapterState:
        """The state of a name; an empty one if the name is unknown."""
        return self.adapters.get(name, AdapterState())

    def split_of(self, name: str) -> Split | None:
        return self.state_of(name).split

    def revision(self, adapter: AdapterRevision) -> Revision | None:
        return self.state_of(adapter.name).revisions.get(adapter.revision)

    def candidate(self, adapter: AdapterRevision) -> Candidate:
        """Raises KeyError if the catalogue has no such revision."""
        return self.adapters[adapter.name].revisions[adapter.revision].candidate

    def resolve(self, requested: RequestedModel) -> AdapterRevision | None:
        """The revision that the alias points to, or the requested one; None if there is none that requests may ask
        for."""
        state = self.state_of(requested.name)
        revision = state.current if requested.revision is None else state.find(requested.revision)
        return revision.candidate.adapter if revision and revision.is_live else None

    def pool_of_name(self, requested: RequestedModel) -> str | None:
        """The pool that the alias points to, by its model's name; None if it points to an adapter, or if a revision is
        asked for."""
        return self.state_of(requested.name).pool if requested.revision is None else None

    def answers_for_its_name(self, adapter: AdapterRevision) -> bool:
        """Whether the alias points to the revision, and not to a pool."""
        return adapter in self.current and self.state_of(adapter.name).pool is None

    def is_reachable(self, adapter: AdapterRevision) -> bool:
        """Whether a request may name the revision: it was neither abandoned nor retired."""
        return self.resolve(RequestedModel(adapter.name, adapter.revision)) is not None

    def was_promoted(self, adapter: AdapterRevision) -> bool:
        revision = self.revision(adapter)
        return revision is not None and revision.is_promoted

    def overdue(self, now: datetime) -> tuple[Revision, ...]:
        """Staged revisions whose staging has ended without a result: the replica that coordinated it died."""
        staged = (self.revision(adapter) for adapter in sorted(self.staged))
        return tuple(revision for revision in staged if revision and revision.until and revision.until < now)

    def of_base(self, fingerprint: str | None) -> Catalogue:
        """The catalogue without the names of adapters for another base model; unchanged for None. A name with no live
        revision belongs to no base model."""
        if fingerprint is None:
            return self
        return replace(
            self,
            adapters={name: state for name, state in self.adapters.items() if fingerprint in state.live_bases},
        )

    def after(self, *entries: Entry | PoolEntry) -> Catalogue:
        """The state once `entries` are appended."""
        adapters, pools = dict(self.adapters), self.pools
        for number, entry in enumerate(entries, self.epoch + 1):
            if isinstance(entry, PoolEntry):
                pools = _with_pool(pools, entry)
                continue
            name = entry.candidate.name
            state = apply(adapters.pop(name, AdapterState()), entry)
            adapters[name] = replace(state, entries=(*state.entries, number))
        return Catalogue(self.epoch + len(entries), adapters, pools)

    def _where(self, condition: Callable[[Revision], bool]) -> frozenset[AdapterRevision]:
        revisions = (revision for state in self.adapters.values() for revision in state.revisions.values())
        return frozenset(revision.candidate.adapter for revision in revisions if condition(revision))


def _with_pool(pools: Mapping[str, AddedPool], entry: PoolEntry) -> Mapping[str, AddedPool]:
    others = {name: pool for name, pool in pools.items() if name != entry.pool.name}
    return others if entry.verb == "remove_pool" else others | {entry.pool.name: entry.pool}
