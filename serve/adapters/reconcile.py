"""Brings a replica to the state in the catalogue, step by step after `serve.adapters.residency.plan_residency`."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel, ConfigDict

from serve.adapters.pool import AdapterPool
from serve.adapters.residency import plan_residency
from serve.catalogue.candidate import Candidate
from serve.catalogue.catalogue import Catalogue
from serve.catalogue.entry import Audit
from serve.catalogue.log import CatalogueLog
from serve.engine.protocol import Engine
from serve.errors import ServeError, StoreUnavailable
from serve.names import AdapterRevision
from serve.observability.events import NO_EVENTS, Events

_RETRY_S = 2.0
_SHOWN_REPAIRS = 20

logger = logging.getLogger(__name__)

# Raises a ServeError if a resident revision does not answer as it should.
Verify = Callable[[Candidate], Awaitable[None]]


class ReplicaReport(BaseModel):
    """The state of one replica after it has followed the catalogue."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    replica: str
    pool: str = ""  # its base model, as callers name it
    epoch: int
    resident: tuple[str, ...]  # engine names, as the engine itself lists them
    running_requests: int  # as the engine itself counts them
    waiting_requests: int = 0  # that wait for an adapter slot
    failures: dict[str, str]  # engine name → reason, of revisions that could not be loaded or verified
    repairs: tuple[str, ...] = ()  # differences between engine and catalogue that were repaired, the latest last
    address: str | None = None  # where the replica itself listens, once it has answered a request
    passed_on_requests: int = 0  # answered by another replica, which holds their adapter
    splits: dict[str, dict[str, Any]] = {}  # name → what the replica saw of its canary or shadow
    context_tokens: int = 0  # of a prompt and its answer together
    idle_s: float = 0.0  # since the last request ended; 0 while there is one


@dataclass
class Reconciler:
    """Follows the catalogue on behalf of one replica.

    Requests are resolved with `catalogue`: a copy that moves on only after every promoted revision was loaded or
    failed to load. Staged revisions are loaded and verified in tasks of their own, so that a slow one delays no other.
    Of the catalogue's adapters the replica holds those for its own base model only.
    """

    replica: str
    log: CatalogueLog
    engine: Engine
    pool: AdapterPool
    verify: Verify
    keep_previous: int = 1
    base: str | None = None  # fingerprint of the base model; None: all adapters are made for it
    base_name: str = ""  # as callers write it
    catalogue: Catalogue = field(default_factory=Catalogue)
    address: Callable[[], str | None] = lambda: None
    forwarded: Callable[[], int] = int
    splits: Callable[[], dict[str, dict[str, Any]]] = dict
    idle_s: Callable[[], float] = float
    events: Events = NO_EVENTS
    need_files: Callable[[frozenset[AdapterRevision]], None] = lambda _: None  # those that a removal shall spare
    _latest: Catalogue = field(default_factory=Catalogue)  # the one that is being followed right now
    _verified: set[AdapterRevision] = field(default_factory=set)  # on this engine
    _failures: dict[AdapterRevision, ServeError] = field(default_factory=dict)
    _staging: dict[AdapterRevision, asyncio.Task[None]] = field(default_factory=dict)
    _steps: dict[AdapterRevision, str] = field(default_factory=dict)  # what a revision that is being staged waits for
    _repairs: deque[str] = field(default_factory=lambda: deque(maxlen=_SHOWN_REPAIRS))
    _syncing: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def failing(self) -> int:
        """The number of revisions that could not be loaded or verified here."""
        return len(self._all_failures())

    async def start(self) -> None:
        """Returns when the replica holds what the catalogue asks for, as far as its engine can.

        Waits for a store that can't be reached. An adapter that can't be loaded is reported and blocks no other.
        """
        while True:
            try:
                await self.sync()
                await asyncio.gather(*self._staging.values())
                if not any(isinstance(error, StoreUnavailable) for error in self._failures.values()):
                    return
            except StoreUnavailable:
                logger.warning("the catalogue can't be read, trying again", exc_info=True)
            await asyncio.sleep(_RETRY_S)

    async def sync(self, awaited: str | None = None, within_s: float | None = None) -> ReplicaReport:
        """Catches up with the catalogue and reports. `awaited` is the engine name of a staged revision: the report
        comes after that one was loaded and verified, or failed. After `within_s` seconds it comes anyway, and says
        what the awaited revision waits for; the work goes on.

        Raises StoreUnavailable if the catalogue can't be reached, but nothing for an adapter that fails.
        """
        try:
            async with asyncio.timeout(within_s) as limit:
                # Shielded: half of a change of the engine is worse than a late one.
                await asyncio.shield(self._catch_up())
                for adapter, task in list(self._staging.items()):
                    if adapter.engine_name == awaited:
                        await asyncio.shield(task)
        except TimeoutError:
            if not limit.expired():
                raise
            report = await self.report()
            if awaited is None or awaited in report.failures:
                return report
            reason = f"after {within_s:g} s it still waits for {self._awaited_step(awaited)}"
            return report.model_copy(update={"failures": report.failures | {awaited: reason}})
        return await self.report()

    async def _catch_up(self) -> None:
        async with self._syncing:
            await self._apply(await self._read_catalogue())

    def _awaited_step(self, engine_name: str) -> str:
        adapter = next((staged for staged in self._staging if staged.engine_name == engine_name), None)
        if adapter is None:
            return "other adapters that the catalogue asks for"
        if self.pool.is_fetching(adapter):
            return "the adapter store to send its files"
        return self._steps.get(adapter, "its turn")

    async def follow(self) -> None:
        """Abandons staged revisions whose deadline has passed, and does a `sync` if the catalogue has changed."""
        latest = await self._read_catalogue()
        for revision in latest.overdue(datetime.now(UTC)):
            why = f"its publish did not come to an end by {revision.until}: whoever coordinated it is gone"
            await asyncio.to_thread(self.log.abandon, revision.candidate, Audit("graft", why), revision.until)
        if latest.epoch != self.catalogue.epoch or latest.overdue(datetime.now(UTC)):
            await self.sync()

    async def repair_drift(self) -> None:
        """Finds and repairs differences between what the engine holds and what it should hold."""
        differences = await self.pool.repair_drift()
        async with self._syncing:
            own = self.catalogue.of_base(self.base)
            surplus = plan_residency(own, self.pool.resident, 0, self.keep_previous).retire
            await self.pool.retire(surplus)
        for difference in differences:
            logger.warning("drift: %s", difference)
            self._repairs.append(f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} {difference}")

    async def report(self) -> ReplicaReport:
        resident = await self.engine.resident_adapters()
        return ReplicaReport(
            replica=self.replica,
            pool=self.base_name,
            epoch=self.catalogue.epoch,
            resident=tuple(sorted(adapter.engine_name for adapter in resident)),
            running_requests=self.engine.running_requests,
            waiting_requests=self.pool.slots.waiting,
            failures={adapter.engine_name: str(error) for adapter, error in sorted(self._all_failures().items())},
            repairs=tuple(self._repairs),
            address=self.address(),
            passed_on_requests=self.forwarded(),
            splits=self.splits(),
            context_tokens=self.engine.context_tokens,
            idle_s=self.idle_s(),
        )

    async def _read_catalogue(self) -> Catalogue:
        latest = await asyncio.to_thread(self.log.follow, self.catalogue)
        self.events.followed(latest.epoch)
        return latest

    async def _apply(self, latest: Catalogue) -> None:
        self._latest = latest
        own, resident = latest.of_base(self.base), self.pool.resident
        plan = plan_residency(own, resident, self.pool.free, self.keep_previous, resident - self._verified)
        self.pool.keep(own.pinned | own.staged)
        self.need_files(latest.needed(self.keep_previous))
        for adapter in plan.stage:
            if adapter not in self._staging:
                self._start_staging(own.candidate(adapter))
        await self._load(plan.load)
        self._forget_failures_except({*own.staged, *plan.load})
        self.pool.forget_unavailable_except(latest.is_reachable)
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

        def ended(_: asyncio.Task[None]) -> None:
            del self._staging[candidate.adapter]
            self._steps.pop(candidate.adapter, None)

        task.add_done_callback(ended)

    async def _stage(self, candidate: Candidate) -> None:
        adapter = candidate.adapter
        self._failures.pop(adapter, None)
        try:
            await self._load_and_verify(candidate)
            self._verified.add(adapter)
        except ServeError as error:
            self._failures[adapter] = error
        except Exception as error:  # any error is the reason of this revision, and must not disturb another one
            logger.exception("could not stage %s", adapter)
            self._failures[adapter] = ServeError(f"{type(error).__name__}: {error}")
        if not self._stays_resident(adapter):
            await self.pool.retire([adapter])

    async def _load_and_verify(self, candidate: Candidate) -> None:
        adapter = candidate.adapter
        self._steps[adapter] = "the engine to load it"
        await self.pool.load(adapter)
        self._steps[adapter] = "the check of another revision"
        async with self.pool.use_reserved(adapter):
            self._steps[adapter] = "the engine's answers to its check"
            try:
                await self.verify(candidate)
            except ServeError as error:
                self.events.verification_failed(adapter, error)
                raise

    def _stays_resident(self, adapter: AdapterRevision) -> bool:
        """Whether a revision that was just staged stays in the engine."""
        if not self._latest.is_reachable(adapter):
            return False  # abandoned or retired meanwhile
        # A revision that serves, and is published once more, goes on serving even if that fails.
        return adapter not in self._failures or self._latest.was_promoted(adapter)

    def _all_failures(self) -> dict[AdapterRevision, ServeError]:
        """Also of the adapters that only a request has asked for."""
        return {**self.pool.unavailable, **self._failures}

    def _forget_failures_except(self, adapters: Iterable[AdapterRevision]) -> None:
        self._failures = {adapter: self._failures[adapter] for adapter in adapters if adapter in self._failures}
