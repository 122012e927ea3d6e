"""Bring a replica to what the catalogue says: a pure diff, and a loop body that acts on it."""

from __future__ import annotations

import asyncio
from collections.abc import Set
from dataclasses import dataclass, field

from pydantic import BaseModel, ConfigDict

from serve.catalogue import Catalogue, CatalogueLog
from serve.engine import Engine
from serve.errors import ServeError
from serve.names import AdapterRevision
from serve.residency import AdapterPool


@dataclass(frozen=True)
class Plan:
    load: tuple[AdapterRevision, ...]
    retire: frozenset[AdapterRevision]


def diff(catalogue: Catalogue, resident: Set[AdapterRevision], free: int) -> Plan:
    """What to load and what to let go. Staged revisions are loaded whatever it takes, since a publish waits
    for them; current ones only into free places, since a request would load them anyway."""
    staged = sorted(catalogue.staged - resident)
    current = sorted(catalogue.current - resident - catalogue.staged)
    return Plan(
        load=(*staged, *current[: max(0, free - len(staged))]),
        retire=frozenset(resident - catalogue.staged - catalogue.current),
    )


class ReplicaReport(BaseModel):
    """What one replica says of itself after following the catalogue."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    replica: str
    epoch: int
    resident: tuple[str, ...]  # engine names, as the engine itself lists them
    running_requests: int  # as the engine itself counts them
    failures: dict[str, str]  # engine name → reason, of loads that did not work


@dataclass
class Reconciler:
    """Follows the catalogue on behalf of one replica. `catalogue` is the copy that requests are resolved
    with: it moves on only after everything staged and promoted was loaded, or failed to."""

    replica: str
    log: CatalogueLog
    engine: Engine
    pool: AdapterPool
    catalogue: Catalogue = field(default_factory=Catalogue)
    _failures: dict[str, str] = field(default_factory=dict)
    _syncing: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def sync(self) -> ReplicaReport:
        """Catch up with the catalogue and report. Never raises for an adapter that can't be loaded."""
        async with self._syncing:
            latest = await asyncio.to_thread(self.log.follow, self.catalogue)
            plan = diff(latest, self.pool.resident, self.pool.free)
            self._failures = await self._load(plan)
            self.catalogue = latest
            await self.pool.retire(plan.retire)
        return await self.report()

    async def follow(self) -> None:
        """`sync` if the catalogue has something new; costs one failed open if it hasn't."""
        if await asyncio.to_thread(self.log.follow, self.catalogue) != self.catalogue:
            await self.sync()

    async def report(self) -> ReplicaReport:
        resident = await self.engine.resident_adapters()
        return ReplicaReport(
            replica=self.replica,
            epoch=self.catalogue.epoch,
            resident=tuple(sorted(adapter.engine_name for adapter in resident)),
            running_requests=self.engine.running_requests,
            failures=self._failures,
        )

    async def _load(self, plan: Plan) -> dict[str, str]:
        failures = {}
        for adapter in plan.load:
            try:
                await self.pool.load(adapter)
            except ServeError as error:
                failures[adapter.engine_name] = str(error)
        return failures
