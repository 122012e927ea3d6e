"""Changes of the catalogue: those that all replicas must hold before a caller sees them, and those that only move an
alias."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Protocol

from pydantic import BaseModel, ConfigDict

from serve.adapters.reconcile import ReplicaReport
from serve.catalogue.adapter_state import Revision
from serve.catalogue.candidate import Candidate
from serve.catalogue.catalogue import Catalogue
from serve.catalogue.entry import Audit
from serve.catalogue.log import CatalogueLog
from serve.errors import (
    PublishFailed,
    PublishUnconfirmed,
    ReplicaUnreachable,
    TransitionRefused,
    UnknownModel,
)
from serve.names import AdapterRevision

# A coordinator that needs longer than this many timeouts of the replicas must have died.
_STAGE_TIMEOUTS = 3
_NO_AUDIT = Audit()


class Replicas(Protocol):
    """All running replicas of the server."""

    async def sync(self, awaited: str | None = None, base: str | None = None) -> Sequence[ReplicaReport]:
        """Has every replica follow the catalogue now, and finish staging the revision with the engine name `awaited`.
        Raises ReplicaUnreachable if one does not answer.

        `base`, the fingerprint of a base model: only the replicas of its pool must answer, and the reports are theirs.
        """
        ...


class Published(BaseModel):
    """The result of a change that moved an alias, or staged a revision for one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str  # the alias
    revision: str  # the engine name that the alias points to now, or that is staged
    epoch: int
    replicas: int
    staged_s: float  # until every replica held the revision
    promoted_s: float  # from then until every replica answered with it; 0 if it is only staged


@dataclass(frozen=True)
class Control:
    """Changes the catalogue and has the replicas follow. Every change names who wants it and why (`audit`)."""

    log: CatalogueLog
    replicas: Replicas
    sync_timeout_s: float = 60.0
    max_pinned: int = 8
    given_bases: frozenset[str] = frozenset()  # of the pools that the server was started with, if it takes others

    async def publish(self, candidate: Candidate, audit: Audit = _NO_AUDIT) -> Published:
        """Stages the candidate on all replicas, then moves the alias. If one replica can't hold or verify it, nothing
        changes for callers.

        Raises PublishFailed with the reason of each replica, or PublishUnconfirmed if the alias moved but not every
        replica confirmed it.
        """
        started = time.monotonic()
        await self.stage_on_all(candidate, audit, self.stage_deadline())
        staged = time.monotonic()
        catalogue = await asyncio.to_thread(self.log.promote, candidate, audit)
        return await self._confirm_move(candidate, catalogue, "is published", started, staged)

    async def stage(self, candidate: Candidate, audit: Audit = _NO_AUDIT) -> Published:
        """Has every replica hold and verify the candidate, which callers reach as NAME@REVISION. The alias does not
        move before a `promote`. Raises PublishFailed."""
        started = time.monotonic()
        catalogue, reports = await self.stage_on_all(candidate, audit, None)
        return _published(candidate, catalogue, reports, time.monotonic() - started, 0)

    async def promote(self, name: str, revision: str, audit: Audit = _NO_AUDIT) -> Published:
        """Points the alias to a revision that is staged, or that served before and is published again then. Raises
        TransitionRefused, UnknownModel, and what `publish` raises."""
        started = time.monotonic()
        target = await self._find(name, revision)
        candidate = target.candidate
        if not target.staged:
            if not target.is_promoted:
                raise TransitionRefused(f"{candidate.adapter} is {target.state}: publish it again.")
            return await self.publish(candidate, audit)
        try:
            check_holding(await self.sync(candidate, awaited=True), candidate.adapter)
        except (PublishFailed, ReplicaUnreachable) as error:
            raise PublishFailed(f"{candidate.adapter} was not promoted and stays staged. {error}") from error
        staged = time.monotonic()
        catalogue = await asyncio.to_thread(self.log.promote, candidate, audit)
        return await self._confirm_move(candidate, catalogue, "is promoted", started, staged)

    async def roll_back(self, name: str, revision: str | None = None, audit: Audit = _NO_AUDIT) -> Published:
        """Points the alias back to the revision before the current one, or to one that served earlier.

        Where every replica still holds that revision this is one entry of the catalogue, and nothing is loaded;
        otherwise it is staged first. Raises TransitionRefused, UnknownModel, and what `publish` raises.
        """
        started = time.monotonic()
        target = await self._find(name, revision) if revision else await self._previous(name)
        candidate = target.candidate
        if not target.is_promoted:
            raise TransitionRefused(f"{candidate.adapter} is {target.state}, it never served: promote it.")
        try:
            reports = await self.sync(candidate)
            # A pool that wakes loads what it should hold.
            if reports or await self._sleeping_base(candidate) is None:
                check_holding(reports, candidate.adapter)
        except PublishFailed:
            await self.stage_on_all(candidate, audit, self.stage_deadline())
        except ReplicaUnreachable as error:
            raise PublishFailed(f"{name} was not rolled back. {error}") from error
        staged = time.monotonic()
        catalogue = await asyncio.to_thread(self.log.roll_back, candidate, audit)
        return await self._confirm_move(candidate, catalogue, "is rolled back to", started, staged)

    async def abandon(self, name: str, revision: str, audit: Audit = _NO_AUDIT) -> Sequence[ReplicaReport]:
        """Gives up a staged revision on all replicas. Raises TransitionRefused if it is not staged, UnknownModel, or
        PublishUnconfirmed."""
        target = await self._find(name, revision)
        candidate = target.candidate
        if not target.staged:
            raise TransitionRefused(f"{candidate.adapter} is {target.state}, not staged: nothing to abandon.")
        catalogue = await asyncio.to_thread(self.log.abandon, candidate, audit)
        return await self.confirm(f"{candidate.adapter} is abandoned", candidate, catalogue.epoch)

    async def retire(self, name: str, audit: Audit = _NO_AUDIT) -> Sequence[ReplicaReport]:
        """Removes an alias from all replicas; running requests finish. Its files and its history stay.

        Raises UnknownModel, TransitionRefused while a revision is pinned, or PublishUnconfirmed if not every replica
        confirmed it.
        """
        catalogue = await asyncio.to_thread(self.log.retire, name, audit)
        retired = max(catalogue.adapters[name].revisions.values(), key=lambda revision: revision.at)
        return await self.confirm(f"{name} is retired", retired.candidate, catalogue.epoch)

    async def pin(self, name: str, revision: str | None, audit: Audit = _NO_AUDIT) -> AdapterRevision:
        """Keeps a revision, by default the current one, resident on every replica until it is unpinned. If one replica
        can't hold it, PublishFailed is raised, and it is unpinned again unless it was pinned before."""
        target = await self._find(name, revision)
        adapter = target.candidate.adapter
        await asyncio.to_thread(self.log.pin, adapter, self.max_pinned, audit)
        try:
            check_holding(await self.sync(target.candidate, awaited=True), adapter)
        except (PublishFailed, ReplicaUnreachable) as error:
            if target.pinned:
                raise PublishFailed(f"{adapter} stays pinned, but not every replica confirmed it. {error}") from error
            await asyncio.to_thread(self.log.unpin, adapter, Audit(audit.by, str(error)))
            raise PublishFailed(f"{adapter} was not pinned. {error}") from error
        return adapter

    async def unpin(self, name: str, revision: str | None, audit: Audit = _NO_AUDIT) -> AdapterRevision:
        """Raises UnknownModel, or PublishUnconfirmed."""
        candidate = (await self._find(name, revision)).candidate
        catalogue = await asyncio.to_thread(self.log.unpin, candidate.adapter, audit)
        await self.confirm(f"{candidate.adapter} is unpinned", candidate, catalogue.epoch)
        return candidate.adapter

    async def stage_on_all(
        self, candidate: Candidate, audit: Audit, until: datetime | None
    ) -> tuple[Catalogue, Sequence[ReplicaReport]]:
        """Stages the candidate and returns when every replica holds it. `until`: see `stage_deadline`; None for no
        deadline. If a replica fails, the revision is abandoned and PublishFailed raised with the reason."""
        adapter = candidate.adapter
        catalogue = await asyncio.to_thread(self.log.stage, candidate, audit, until, self.given_bases)
        try:
            reports = await self.sync(candidate, awaited=True)
            if not reports and (sleeper := await self._sleeping_base(candidate)):
                raise PublishFailed(f"Its base model {sleeper} is asleep: send that a request, and try again.")
            check_holding(reports, adapter)
        except (PublishFailed, ReplicaUnreachable) as error:
            await asyncio.to_thread(self.log.abandon, candidate, Audit(audit.by, str(error)))
            raise PublishFailed(f"{adapter} was not published, the alias still points where it did. {error}") from error
        return catalogue, reports

    def stage_deadline(self) -> datetime:
        """The time after which the replicas abandon a revision that is still staged: its coordinator has died."""
        return datetime.now(UTC) + timedelta(seconds=_STAGE_TIMEOUTS * self.sync_timeout_s)

    async def sync(self, candidate: Candidate, *, awaited: bool = False) -> Sequence[ReplicaReport]:
        """Has every replica that may hold the candidate follow the catalogue; with `awaited`, finish staging it too.
        Raises ReplicaUnreachable."""
        return await self.replicas.sync(candidate.adapter.engine_name if awaited else None, candidate.base)

    async def confirm(self, change: str, candidate: Candidate, epoch: int) -> Sequence[ReplicaReport]:
        """Has every replica that may hold the candidate follow the catalogue up to `epoch`. Raises PublishUnconfirmed,
        whose message says that the `change` was made nevertheless."""
        try:
            reports = await self.sync(candidate)
        except ReplicaUnreachable as error:
            raise PublishUnconfirmed(f"{change}, but not every replica confirmed it: {error}") from error
        behind = sorted(report.replica for report in reports if report.epoch < epoch)
        if behind:
            raise PublishUnconfirmed(f"{change}, but these replicas do not follow yet: {', '.join(behind)}.")
        return reports

    async def _confirm_move(
        self, candidate: Candidate, catalogue: Catalogue, change: str, started: float, staged: float
    ) -> Published:
        reports = await self.confirm(f"{candidate.adapter} {change}", candidate, catalogue.epoch)
        return _published(candidate, catalogue, reports, staged - started, time.monotonic() - staged)

    async def _sleeping_base(self, candidate: Candidate) -> str | None:
        """The name of the candidate's base model, if that is a pool which sleeps."""
        if candidate.base in self.given_bases:
            return None
        pools = (await asyncio.to_thread(self.log.read)).pools.values()
        return next((pool.name for pool in pools if pool.base == candidate.base and pool.asleep), None)

    async def _find(self, name: str, revision: str | None) -> Revision:
        """A revision of a name; the current one for None. Raises UnknownModel."""
        return _revision_of(await asyncio.to_thread(self.log.read), name, revision)

    async def _previous(self, name: str) -> Revision:
        catalogue = await asyncio.to_thread(self.log.read)
        current = _revision_of(catalogue, name, None)
        if catalogue.adapters[name].pool:
            return current  # the alias points to a pool, and pointed to this revision before
        previous = catalogue.adapters[name].previous()
        if not previous:
            raise TransitionRefused(f"{name} has no revision before the current one: there is nothing to go back to.")
        return previous[0]


def _revision_of(catalogue: Catalogue, name: str, revision: str | None) -> Revision:
    """A revision of a name; the current one for None. Raises UnknownModel."""
    state = catalogue.state_of(name)
    target = state.find(revision) if revision else state.current
    if target is None:
        requested = f"{name}@{revision}" if revision else name
        revisions = {str(existing.candidate.adapter) for existing in state.revisions.values()}
        raise UnknownModel(requested, revisions or catalogue.adapters)
    return target


def max_pinned(capacity: int) -> int:
    """How many of the `capacity` adapters of a replica may be pinned: a publish needs room for the new revision beside
    the old one."""
    return max(0, capacity - 2)


def check_holding(reports: Sequence[ReplicaReport], adapter: AdapterRevision) -> None:
    """Raises PublishFailed with the reason of each replica that does not hold the adapter, or if there is no
    replica."""
    name = adapter.engine_name
    if not reports:
        raise PublishFailed("No replica is running.")
    lacking = [report for report in reports if name not in report.resident or name in report.failures]
    if lacking:
        raise PublishFailed(
            "; ".join(
                f"Replica {report.replica}: {report.failures.get(name, 'it is not resident')}" for report in lacking
            )
        )


def _published(
    candidate: Candidate, catalogue: Catalogue, reports: Sequence[ReplicaReport], staged_s: float, promoted_s: float
) -> Published:
    return Published(
        model=candidate.name,
        revision=candidate.adapter.engine_name,
        epoch=catalogue.epoch,
        replicas=len(reports),
        staged_s=round(staged_s, 3),
        promoted_s=round(promoted_s, 3),
    )
