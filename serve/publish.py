"""Publish in two phases: every replica holds the new revision before the alias moves to it anywhere."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Protocol

from pydantic import BaseModel, ConfigDict

from serve.candidate import Candidate
from serve.catalogue import CatalogueLog
from serve.errors import PublishFailed, PublishUnconfirmed, ReplicaUnreachable
from serve.names import AdapterRevision
from serve.reconcile import ReplicaReport


class Replicas(Protocol):
    """All running replicas of the base model."""

    async def sync(self) -> Sequence[ReplicaReport]:
        """Have every one follow the catalogue now. Raises ReplicaUnreachable if one does not answer."""
        ...


class Published(BaseModel):
    """The answer to a publish."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str  # the alias
    revision: str  # the engine name it points to now
    epoch: int
    replicas: int
    staged_s: float  # until every replica held it
    promoted_s: float  # until every replica answered with it


async def publish(log: CatalogueLog, replicas: Replicas, candidate: Candidate) -> Published:
    """Stage on all, then move the alias. If one replica can't hold it nothing changes for users.

    Raises PublishFailed with each replica's reason, or PublishUnconfirmed if the alias moved but not every
    replica could be asked whether it follows.
    """
    adapter = candidate.adapter
    started = time.monotonic()
    await asyncio.to_thread(log.stage, candidate)
    try:
        check_holding(await replicas.sync(), adapter)
    except (PublishFailed, ReplicaUnreachable) as error:
        await asyncio.to_thread(log.abandon, candidate, str(error))
        raise PublishFailed(f"{adapter} was not published, the alias still points where it did. {error}") from error
    staged = time.monotonic()
    catalogue = await asyncio.to_thread(log.promote, candidate)
    reports = await confirm(replicas, f"{adapter} is published", catalogue.epoch)
    return Published(
        model=adapter.name,
        revision=adapter.engine_name,
        epoch=catalogue.epoch,
        replicas=len(reports),
        staged_s=round(staged - started, 3),
        promoted_s=round(time.monotonic() - staged, 3),
    )


async def retire(log: CatalogueLog, replicas: Replicas, name: str) -> Sequence[ReplicaReport]:
    """Take an alias away everywhere; running requests finish. Its files and its history stay.

    Raises UnknownModel, or PublishUnconfirmed if not every replica could be asked whether it follows.
    """
    catalogue = await asyncio.to_thread(log.retire, name)
    return await confirm(replicas, f"{name} is retired", catalogue.epoch)


def check_holding(reports: Sequence[ReplicaReport], adapter: AdapterRevision) -> None:
    """Raises PublishFailed with the reason of each replica that does not hold it, or if there is none."""
    name = adapter.engine_name
    if not reports:
        raise PublishFailed("No replica is running.")
    lacking = [report for report in reports if name not in report.resident]
    if lacking:
        raise PublishFailed(
            "; ".join(f"Replica {it.replica}: {it.failures.get(name, 'it is not resident')}" for it in lacking)
        )


async def confirm(replicas: Replicas, done: str, epoch: int) -> Sequence[ReplicaReport]:
    """Have every replica follow to `epoch`. Raises PublishUnconfirmed, saying what was `done` nevertheless."""
    try:
        reports = await replicas.sync()
    except ReplicaUnreachable as error:
        raise PublishUnconfirmed(f"{done}, but not every replica confirmed it: {error}") from error
    behind = sorted(report.replica for report in reports if report.epoch < epoch)
    if behind:
        raise PublishUnconfirmed(f"{done}, but these replicas do not follow yet: {', '.join(behind)}.")
    return reports
