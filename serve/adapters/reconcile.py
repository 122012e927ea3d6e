"""Bring a replica to what the catalogue says: a pure diff, and a loop body that acts on it."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Set
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import islice
from typing import Any

from pydantic import BaseModel, ConfigDict

from serve.candidate import Candidate
from serve.catalogue import Catalogue
from serve.engine import Engine
from serve.entry import Cause
from serve.errors import ServeError, StoreUnavailable
from serve.events import NOBODY, Events
from serve.log import CatalogueLog
from serve.names import AdapterRevision, RequestedModel
from serve.residency import AdapterPool

_RETRY_S = 2.0
_SHOWN_REPAIRS = 20

logger = logging.getLogger(__name__)

# Raises a ServeError if a resident revision is not what it should be.
Prove = Callable[[Candidate], Awaitable[None]]


@dataclass(frozen=True)
class Plan:
    stage: tuple[AdapterRevision, ...]
    load: tuple[AdapterRevision, ...]
    retire: frozenset[AdapterRevision]


def diff(
    catalogue: Catalogue,
    resident: Set[AdapterRevision],
    free: int,
    keep_previous: int = 1,
    unproven: Set[AdapterRevision] = frozenset(),
) -> Plan:
    """What to load and what to let go; `unproven` are resident revisions that are still to be proven.

    Staged and pinned revisions are loaded whatever it takes, since a publish waits for them and a pin says so; current
    ones and those before them only into free places, what changed last first, since a request would load them anyway.
    Many registered adapters cost no more than few, beyond one look at which names there are.
    """
    staged = sorted(catalogue.staged - (resident - unproven))
    pinned = sorted(catalogue.pinned - catalogue.staged - resident)
    asked = {*staged, *pinned, *resident}
    others = (it for it in _loaded_ahead(catalogue, keep_previous) if it not in asked)
    return Plan(
        stage=tuple(staged),
        load=(*pinned, *islice(others, max(0, free - len(staged) - len(pinned)))),
        retire=frozenset(it for it in resident if not _is_wanted(catalogue, it, keep_previous)),
    )


def _loaded_ahead(catalogue: Catalogue, keep_previous: int) -> Iterator[AdapterRevision]:
    """Current ones, then those before them, each with what changed last first."""
    latest = list(catalogue.adapters)[::-1]
    for name in latest:
        if current := catalogue.adapters[name].current:
            yield current.candidate.adapter
    for name in latest:
        for revision in catalogue.adapters[name].previous(keep_previous):
            yield revision.candidate.adapter


def _is_wanted(catalogue: Catalogue, adapter: AdapterRevision, keep_previous: int) -> bool:
    revision = catalogue.revision(adapter)
    if revision is None:
        return False
    state = catalogue.adapters[adapter.name]
    return revision.staged or revision.pinned or revision in (state.current, *state.previous(keep_previous))


class ReplicaReport(BaseModel):
    """What one replica says of itself after following the catalogue."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    replica: str
    epoch: int
    resident: tuple[str, ...]  # engine names, as the engine itself lists them
    running_requests: int  # as the engine itself counts them
    waiting_requests: int = 0  # that wait for an adapter slot
    failures: dict[str, str]  # engine name → reason, of loads and proofs that did not work
    repairs: tuple[str, ...] = ()  # when the engine was found to hold something else than it should, latest last
    address: str | None = None  # where it listens itself, once it has answered a request
    passed_on_requests: int = 0  # that a replica which holds their adapter has answered
    splits: dict[str, dict[str, Any]] = {}  # name → what it saw of a canary or shadow


@dataclass
class Reconciler:
    """Follows the catalogue on behalf of one replica. `catalogue` is the copy that requests are resolved with: it
    moves on only after everything promoted was loaded, or failed to. Staged revisions are loaded and proven beside
    that: a slow one holds up nobody else."""

    replica: str
    log: CatalogueLog
    engine: Engine
    pool: AdapterPool
    prove: Prove
    keep_previous: int = 1
    catalogue: Catalogue = field(default_factory=Catalogue)
    address: Callable[[], str | None] = lambda: None
    passed_on: Callable[[], int] = int
    splits: Callable[[], dict[str, dict[str, Any]]] = dict
    events: Events = NOBODY
    _latest: Catalogue = field(default_factory=Catalogue)  # what is being followed right now
    _proven: set[AdapterRevision] = field(default_factory=set)  # on this engine
    _failures: dict[AdapterRevision, ServeError] = field(default_factory=dict)
    _staging: dict[AdapterRevision, asyncio.Task[None]] = field(default_factory=dict)
    _repairs: deque[str] = field(default_factory=lambda: deque(maxlen=_SHOWN_REPAIRS))
    _syncing: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def failing(self) -> int:
        """Revisions that could not be loaded or proven here."""
        return len(self._failures)

    async def start(self) -> None:
        """Return when the replica holds what the catalogue asks for, as far as its engine can. Waits for a store that
        is out of reach; an adapter that can't be loaded is reported and blocks no other."""
        while True:
            try:
                await self.sync()
                await asyncio.gather(*self._staging.values())
                if not any(isinstance(it, StoreUnavailable) for it in self._failures.values()):
                    return
            except StoreUnavailable:
                logger.warning("the catalogue is out of reach; trying again", exc_info=True)
            await asyncio.sleep(_RETRY_S)

    async def sync(self, awaited: str | None = None) -> ReplicaReport:
        """Catch up with the catalogue and report, after the staged revision of that engine name was loaded or failed
        to. Never raises for an adapter; StoreUnavailable if the catalogue is out of reach."""
        async with self._syncing:
            latest = await asyncio.to_thread(self.log.follow, self.catalogue)
            self.events.followed(latest.epoch)
            await self._apply(latest)
        for adapter, task in list(self._staging.items()):
            if adapter.engine_name == awaited:
                await asyncio.shield(task)
        return await self.report()

    async def follow(self) -> None:
        """`sync` if the catalogue has something new; costs one look if it hasn't. Gives up what is overdue."""
        latest = await asyncio.to_thread(self.log.follow, self.catalogue)
        self.events.followed(latest.epoch)
        for revision in latest.overdue(datetime.now(UTC)):
            why = f"its publish did not come to an end by {revision.until}: whoever coordinated it is gone"
            await asyncio.to_thread(self.log.abandon, revision.candidate, Cause("graft", why), revision.until)
        if latest.epoch != self.catalogue.epoch or latest.overdue(datetime.now(UTC)):
            await self.sync()

    async def audit(self) -> None:
        """Find and mend what differs between the engine and what it should hold."""
        found = await self.pool.audit()
        async with self._syncing:
            surplus = diff(self.catalogue, self.pool.resident, 0, self.keep_previous).retire
            await self.pool.retire(surplus)
        for what in found:
            logger.warning("drift: %s", what)
            self._repairs.append(f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} {what}")

    async def report(self) -> ReplicaReport:
        resident = await self.engine.resident_adapters()
        return ReplicaReport(
            replica=self.replica,
            epoch=self.catalogue.epoch,
            resident=tuple(sorted(adapter.engine_name for adapter in resident)),
            running_requests=self.engine.running_requests,
            waiting_requests=self.pool.turns.waiting,
            failures={adapter.engine_name: str(error) for adapter, error in sorted(self._failures.items())},
            repairs=tuple(self._repairs),
            address=self.address(),
            passed_on_requests=self.passed_on(),
            splits=self.splits(),
        )

    async def _apply(self, latest: Catalogue) -> None:
        self._latest = latest
        resident = self.pool.resident
        plan = diff(latest, resident, self.pool.free, self.keep_previous, resident - self._proven)
        self.pool.keep(latest.pinned | latest.staged)
        for adapter in plan.stage:
            if adapter not in self._staging:
                self._start_staging(latest.candidate(adapter))
        await self._load(plan.load)
        self._forget_failures_except(latest.staged | {it for it in plan.load if it in self._failures})
        self.catalogue = latest
        await self.pool.retire(plan.retire)

    async def _load(self, adapters: Iterable[AdapterRevision]) -> None:
        for adapter in adapters:
            self._failures.pop(adapter, None)
            try:
                await self.pool.load(adapter)
            except ServeError as error:
                self._failures[adapter] = error

    def _start_staging(self, candidate: Candidate) -> None:
        task = asyncio.create_task(self._stage(candidate))
        self._staging[candidate.adapter] = task
        task.add_done_callback(lambda _: self._staging.pop(candidate.adapter))

    async def _stage(self, candidate: Candidate) -> None:
        adapter = candidate.adapter
        self._failures.pop(adapter, None)
        try:
            await self.pool.load(adapter)
            async with self.pool.use(adapter, patient=True):
                await self._prove(candidate)
            self._proven.add(adapter)
        except ServeError as error:
            self._failures[adapter] = error
        except Exception as error:  # whatever it is, it must be this revision's reason and nobody else's trouble
            logger.exception("could not stage %s", adapter)
            self._failures[adapter] = ServeError(f"{type(error).__name__}: {error}")
        known = self._latest.resolve(RequestedModel(adapter.name, adapter.revision))
        serves = self._latest.was_promoted(adapter)  # published again: what it is does not depend on this
        if known is None or (adapter in self._failures and not serves):
            await self.pool.retire([adapter])

    async def _prove(self, candidate: Candidate) -> None:
        try:
            await self.prove(candidate)
        except ServeError as error:
            self.events.proof_failed(candidate.adapter, error)
            raise

    def _forget_failures_except(self, adapters: Iterable[AdapterRevision]) -> None:
        self._failures = {it: self._failures[it] for it in adapters if it in self._failures}
