"""Bring a replica to what the catalogue says: a pure diff, and a loop body that acts on it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Set
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

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
    for them; current ones only into free places, those known last first, since a request would load them anyway.
    Costs no more with many registered adapters than with few, beyond one look at what is staged."""
    staged = catalogue.staged
    missing = sorted(staged - resident)
    newest = (it for it in reversed(tuple(catalogue.candidates)) if it not in resident and it not in staged)
    current = islice((it for it in newest if _is_current(catalogue, it)), max(0, free - len(missing)))
    return Plan(
        load=(*missing, *current),
        retire=frozenset(it for it in resident if it not in staged and not _is_current(catalogue, it)),
    )


def _is_current(catalogue: Catalogue, adapter: AdapterRevision) -> bool:
    state = catalogue.adapters.get(adapter.name)
    return state is not None and state.current == adapter


class ReplicaReport(BaseModel):
    """What one replica says of itself after following the catalogue."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    replica: str
    epoch: int
    resident: tuple[str, ...]  # engine names, as the engine itself lists them
    running_requests: int  # as the engine itself counts them
    waiting_requests: int = 0  # that wait for an adapter slot
    failures: dict[str, str]  # engine name → reason, of loads that did not work
    address: str | None = None  # where it listens itself, once it has answered a request
    passed_on_requests: int = 0  # that a replica which holds their adapter has answered
    splits: dict[str, dict[str, Any]] = {}  # name → what it saw of a canary or shadow


@dataclass
class Reconciler:
    """Follows the catalogue on behalf of one replica. `catalogue` is the copy that requests are resolved
    with: it moves on only after everything staged and promoted was loaded, or failed to."""

    replica: str
    log: CatalogueLog
    engine: Engine
    pool: AdapterPool
    catalogue: Catalogue = field(default_factory=Catalogue)
    address: Callable[[], str | None] = lambda: None
    passed_on: Callable[[], int] = int
    splits: Callable[[], dict[str, dict[str, Any]]] = dict
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
            waiting_requests=self.pool.turns.waiting,
            failures=self._failures,
            address=self.address(),
            passed_on_requests=self.passed_on(),
            splits=self.splits(),
        )

    async def _load(self, plan: Plan) -> dict[str, str]:
        failures = {}
        for adapter in plan.load:
            try:
                await self.pool.load(adapter)
            except ServeError as error:
                failures[adapter.engine_name] = str(error)
        return failures
