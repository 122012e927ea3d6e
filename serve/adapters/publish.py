"""Every change that replicas must hold before callers see it, and those that only move an alias."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Protocol

from pydantic import BaseModel, ConfigDict

from serve.candidate import Candidate
from serve.catalogue import AdapterState, Catalogue, Revision
from serve.entry import Cause
from serve.errors import (
    PublishFailed,
    PublishUnconfirmed,
    ReplicaUnreachable,
    TransitionRefused,
    UnknownModel,
)
from serve.log import CatalogueLog
from serve.names import AdapterRevision
from serve.reconcile import ReplicaReport

# A coordinator that has not finished after so many times the replicas' own limit is gone.
_LEASE_TIMEOUTS = 3
_NOBODY = Cause()


class Replicas(Protocol):
    """All running replicas of the base model."""

    async def sync(self, awaited: str | None = None) -> Sequence[ReplicaReport]:
        """Have every one follow the catalogue now, and finish staging the revision of that engine name.
        Raises ReplicaUnreachable if one does not answer."""
        ...


class Published(BaseModel):
    """The answer to what moves an alias or stages for it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str  # the alias
    revision: str  # the engine name it points to now, or that is staged
    epoch: int
    replicas: int
    staged_s: float  # until every replica held it
    promoted_s: float  # until every replica answered with it; 0 if it is staged only


@dataclass(frozen=True)
class Control:
    """Whoever may change the catalogue does it through this, on behalf of one caller at a time."""

    log: CatalogueLog
    replicas: Replicas
    sync_timeout_s: float = 60.0
    most_pinned: int = 8

    async def publish(self, candidate: Candidate, cause: Cause = _NOBODY) -> Published:
        """Stage on all, then move the alias. If one replica can't hold or prove it nothing changes for users.

        Raises PublishFailed with each replica's reason, or PublishUnconfirmed if the alias moved but not every
        replica could be asked whether it follows.
        """
        started = time.monotonic()
        await self.hold(candidate, cause, self.lease())
        staged = time.monotonic()
        catalogue = await asyncio.to_thread(self.log.promote, candidate, cause)
        return await self._moved(candidate, catalogue, "is published", started, staged)

    async def stage(self, candidate: Candidate, cause: Cause = _NOBODY) -> Published:
        """Have every replica hold and prove it, reachable as NAME@REVISION; the alias stays where it is until a
        promote. Raises PublishFailed."""
        started = time.monotonic()
        catalogue, reports = await self.hold(candidate, cause, None)
        return _published(candidate, catalogue, reports, time.monotonic() - started, 0)

    async def promote(self, name: str, revision: str, cause: Cause = _NOBODY) -> Published:
        """Point the alias to a revision that is staged, or that served before. Raises as `publish` does."""
        started = time.monotonic()
        found = await self._find(name, revision)
        if not found.staged:
            if not found.is_promoted:
                raise TransitionRefused(f"{found.candidate.adapter} is {found.state}: publish it again.")
            return await self.publish(found.candidate, cause)
        try:
            check_holding(await self.replicas.sync(found.candidate.adapter.engine_name), found.candidate.adapter)
        except (PublishFailed, ReplicaUnreachable) as error:
            raise PublishFailed(f"{found.candidate.adapter} was not promoted and stays staged. {error}") from error
        staged = time.monotonic()
        catalogue = await asyncio.to_thread(self.log.promote, found.candidate, cause)
        return await self._moved(found.candidate, catalogue, "is promoted", started, staged)

    async def roll_back(self, name: str, revision: str | None = None, cause: Cause = _NOBODY) -> Published:
        """Point the alias back: to the revision it pointed to before, or to one that served earlier. One entry, and
        nothing is loaded where every replica still holds it; else it is staged first. Raises as `publish` does."""
        started = time.monotonic()
        target = await self._find(name, revision) if revision else await self._before(name)
        candidate = target.candidate
        if not target.is_promoted:
            raise TransitionRefused(f"{candidate.adapter} is {target.state}, it never served: promote it.")
        try:
            check_holding(await self.replicas.sync(), candidate.adapter)
        except PublishFailed:
            await self.hold(candidate, cause, self.lease())
        except ReplicaUnreachable as error:
            raise PublishFailed(f"{name} was not rolled back. {error}") from error
        staged = time.monotonic()
        catalogue = await asyncio.to_thread(self.log.roll_back, candidate, cause)
        return await self._moved(candidate, catalogue, "is rolled back to", started, staged)

    async def abandon(self, name: str, revision: str, cause: Cause = _NOBODY) -> Sequence[ReplicaReport]:
        """Give a staged revision up everywhere. Raises TransitionRefused if it is not staged."""
        found = await self._find(name, revision)
        if not found.staged:
            raise TransitionRefused(f"{found.candidate.adapter} is {found.state}, not staged: nothing to abandon.")
        catalogue = await asyncio.to_thread(self.log.abandon, found.candidate, cause)
        return await self.confirm(f"{found.candidate.adapter} is abandoned", catalogue.epoch)

    async def retire(self, name: str, cause: Cause = _NOBODY) -> Sequence[ReplicaReport]:
        """Take an alias away everywhere; running requests finish. Its files and its history stay.

        Raises UnknownModel, TransitionRefused while a revision is pinned, or PublishUnconfirmed if not every replica
        could be asked whether it follows.
        """
        catalogue = await asyncio.to_thread(self.log.retire, name, cause)
        return await self.confirm(f"{name} is retired", catalogue.epoch)

    async def pin(self, name: str, revision: str | None, cause: Cause = _NOBODY) -> AdapterRevision:
        """Keep a revision, or the current one, resident on every replica until it is unpinned. If one replica can't
        hold it, it is unpinned again and PublishFailed raised."""
        adapter = (await self._find(name, revision)).candidate.adapter
        await asyncio.to_thread(self.log.pin, adapter, self.most_pinned, cause)
        try:
            check_holding(await self.replicas.sync(adapter.engine_name), adapter)
        except (PublishFailed, ReplicaUnreachable) as error:
            await asyncio.to_thread(self.log.unpin, adapter, Cause(cause.by, str(error)))
            raise PublishFailed(f"{adapter} was not pinned. {error}") from error
        return adapter

    async def unpin(self, name: str, revision: str | None, cause: Cause = _NOBODY) -> AdapterRevision:
        adapter = (await self._find(name, revision)).candidate.adapter
        catalogue = await asyncio.to_thread(self.log.unpin, adapter, cause)
        await self.confirm(f"{adapter} is unpinned", catalogue.epoch)
        return adapter

    async def hold(
        self, candidate: Candidate, cause: Cause, until: datetime | None
    ) -> tuple[Catalogue, Sequence[ReplicaReport]]:
        """Every replica holds it when this returns. Raises PublishFailed after giving it up with the reason."""
        adapter = candidate.adapter
        catalogue = await asyncio.to_thread(self.log.stage, candidate, cause, until)
        try:
            reports = await self.replicas.sync(adapter.engine_name)
            check_holding(reports, adapter)
        except (PublishFailed, ReplicaUnreachable) as error:
            await asyncio.to_thread(self.log.abandon, candidate, Cause(cause.by, str(error)))
            raise PublishFailed(f"{adapter} was not published, the alias still points where it did. {error}") from error
        return catalogue, reports

    async def _moved(
        self, candidate: Candidate, catalogue: Catalogue, done: str, started: float, staged: float
    ) -> Published:
        reports = await self.confirm(f"{candidate.adapter} {done}", catalogue.epoch)
        return _published(candidate, catalogue, reports, staged - started, time.monotonic() - staged)

    async def confirm(self, done: str, epoch: int) -> Sequence[ReplicaReport]:
        """Have every replica follow to `epoch`. Raises PublishUnconfirmed, saying what was `done` nevertheless."""
        try:
            reports = await self.replicas.sync()
        except ReplicaUnreachable as error:
            raise PublishUnconfirmed(f"{done}, but not every replica confirmed it: {error}") from error
        behind = sorted(report.replica for report in reports if report.epoch < epoch)
        if behind:
            raise PublishUnconfirmed(f"{done}, but these replicas do not follow yet: {', '.join(behind)}.")
        return reports

    async def _find(self, name: str, revision: str | None) -> Revision:
        """A revision of a name; the current one for None. Raises UnknownModel."""
        catalogue = await asyncio.to_thread(self.log.read)
        state = catalogue.adapters.get(name, AdapterState())
        found = state.find(revision) if revision else state.current
        if found is None:
            asked = f"{name}@{revision}" if revision else name
            raise UnknownModel(
                asked, {str(it.candidate.adapter) for it in state.revisions.values()} or catalogue.adapters
            )
        return found

    async def _before(self, name: str) -> Revision:
        await self._find(name, None)
        catalogue = await asyncio.to_thread(self.log.read)
        before = catalogue.adapters[name].previous()
        if not before:
            raise TransitionRefused(f"{name} has no revision before the current one: there is nothing to go back to.")
        return before[0]

    def lease(self) -> datetime:
        """Until when a revision stays staged whose coordinator dies."""
        return datetime.now(UTC) + timedelta(seconds=_LEASE_TIMEOUTS * self.sync_timeout_s)


def most_pinned(resident: int) -> int:
    """Of that many places of a replica: a publish needs one for the new revision beside the old one."""
    return max(0, resident - 2)


def check_holding(reports: Sequence[ReplicaReport], adapter: AdapterRevision) -> None:
    """Raises PublishFailed with the reason of each replica that does not hold it, or if there is none."""
    name = adapter.engine_name
    if not reports:
        raise PublishFailed("No replica is running.")
    lacking = [report for report in reports if name not in report.resident or name in report.failures]
    if lacking:
        raise PublishFailed(
            "; ".join(f"Replica {it.replica}: {it.failures.get(name, 'it is not resident')}" for it in lacking)
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
