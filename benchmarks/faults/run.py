"""One fault after another on a running World, under load and under publishes."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import httpx

from benchmarks.faults.callers import Callers, counted
from benchmarks.faults.suite import Fault
from benchmarks.faults.world import REPLICAS, World

BEFORE_S = 3.0  # of undisturbed load, so that requests are under way
AFTER_S = 2.0
RECOVERY_TIMEOUT_S = 240.0
_GOOD_IN_A_ROW = 6
_PUBLISH_EVERY_S = 3.0
_POLL_S = 0.25
_SHOWN_REASONS = 3


@dataclass(frozen=True)
class Row:
    """One fault, and what was seen of it."""

    name: str
    outcomes: dict[str, int]  # of the requests that ran between its begin and the recovery
    recovery_s: float  # from when the fault was over until everything was whole
    acknowledged: int  # publishes
    acknowledged_lost: int
    refused_publishes: tuple[str, ...]  # why
    alerts: tuple[str, ...]  # that were pending or firing at any time
    reasons: tuple[str, ...]  # a few of the failed requests
    left_processes: int = 0  # of the server, that it doesn't know any more

    def as_data(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Publisher:
    """Moves `french` between its two revisions, again and again. What was acknowledged must stay."""

    world: World
    acknowledged: list[str] = field(default_factory=list)
    tried: list[str] = field(default_factory=list)  # since the last acknowledged one
    refused: list[str] = field(default_factory=list)

    async def publish_on(self) -> None:
        while True:
            for artifact in ("second", "first"):
                await self.publish(artifact)
                await asyncio.sleep(_PUBLISH_EVERY_S)

    async def publish(self, artifact: str) -> None:
        self.tried.append(self.world.candidate(artifact, "french").adapter.engine_name)
        try:
            self.acknowledged.append(await self.world.publish(artifact, "french"))
            self.tried.clear()
        except httpx.HTTPStatusError as error:
            self.refused.append(error.response.text[:200])
        except httpx.HTTPError as error:
            self.refused.append(repr(error)[:200])

    def is_lost(self, current: str) -> bool:
        """What was tried without an answer may have come about, as everywhere."""
        return bool(self.acknowledged) and current not in {self.acknowledged[-1], *self.tried}


async def run(world: World, faults: Sequence[Fault], tell: Callable[[str], None]) -> list[Row]:
    await world.learn()
    callers = world.callers()
    rows = []
    async with callers.asking():
        for fault in faults:
            row = await suffer(world, callers, fault)
            tell(f"{row.name:45} whole after {row.recovery_s:5.1f} s   {dict(row.outcomes)}   {', '.join(row.alerts)}")
            for reason in row.reasons:
                tell(f"    {reason}")
            rows.append(row)
    return rows


async def suffer(world: World, callers: Callers, fault: Fault) -> Row:
    publisher = Publisher(world)
    async with _running(publisher.publish_on()), _running(_alerts_of(world, alerts := set[str]())):
        await asyncio.sleep(BEFORE_S)
        began = callers.now()
        over = await fault.happen(world) or time.monotonic()
        await whole(world, callers)
        recovery_s = time.monotonic() - over
        await asyncio.sleep(AFTER_S)
        ended = callers.now()
    lost = publisher.is_lost(world.current("french"))
    asked = callers.between(began, ended)
    return Row(
        fault.name,
        counted(asked),
        round(recovery_s, 2),
        len(publisher.acknowledged),
        int(lost),
        tuple(dict(Counter(publisher.refused).most_common(_SHOWN_REASONS))),
        tuple(sorted(alerts)),
        tuple(dict(Counter(it.told for it in asked if it.outcome != "answered").most_common(_SHOWN_REASONS))),
        len(world.left_behind()),
    )


async def whole(world: World, callers: Callers) -> None:
    """Until every replica is there, holds what the catalogue says, and everyone is answered. Raises TimeoutError."""
    async with asyncio.timeout(RECOVERY_TIMEOUT_S):
        while not await _holds_everything(world) or not await _answers(callers):  # noqa: ASYNC110  (no event tells)
            await asyncio.sleep(_POLL_S)


async def _holds_everything(world: World) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        current = {await asyncio.to_thread(world.current, name) for name in world.said.names}
        replicas = await world.replicas()
        return len(replicas) == REPLICAS and all(current <= set(it["resident"]) for it in replicas)
    return False


async def _answers(callers: Callers) -> bool:
    asking = (callers.ask(callers.model(number), stream=number % 2 == 0) for number in range(_GOOD_IN_A_ROW))
    asked = await asyncio.gather(*asking)
    return all(it.outcome == "answered" for it in asked)


async def _alerts_of(world: World, seen: set[str]) -> None:
    while world.prometheus:
        with contextlib.suppress(httpx.HTTPError, RuntimeError):
            found = await asyncio.to_thread(world.prometheus.query, "ALERTS")
            seen |= {f"{it['metric']['alertname']} ({it['metric']['alertstate']})" for it in found}
        await asyncio.sleep(1)


@contextlib.asynccontextmanager
async def _running(work: Any) -> AsyncIterator[None]:
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
