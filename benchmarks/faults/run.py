"""Inject one fault after another into a running testbed, under load and while adapters are published."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from benchmarks.faults.callers import HUNG_AFTER_S, Callers, count_outcomes
from benchmarks.faults.pools import add_pool, is_running
from benchmarks.faults.suite import Fault
from benchmarks.faults.testbed import POOL, REPLICAS, Testbed

BEFORE_S = 3.0  # of undisturbed load, so that requests are under way
AFTER_S = 2.0
RECOVERY_TIMEOUT_S = 240.0
_REQUESTS_OF_RECOVERY_CHECK = 6
_PUBLISH_EVERY_S = 3.0
_POLL_S = 0.25
_SHOWN_REASONS = 3


@dataclass(frozen=True)
class FaultResult:
    """One fault and what was observed; the fields are keys of the result's JSON."""

    name: str
    outcomes: dict[str, int]  # of the requests that ran between the injection and the recovery
    recovery_s: float  # from the end of the fault until the testbed had recovered
    acknowledged: int  # publishes acknowledged
    acknowledged_lost: int
    refused_publishes: tuple[str, ...]  # the most common errors
    alerts: tuple[str, ...]  # pending or firing at any time, as `NAME (STATE)`
    reasons: tuple[str, ...]  # the most common details of failed requests
    left_processes: int = 0  # orphaned processes of the server


@dataclass
class Publisher:
    """Publishes the two revisions of `french` in turn and records which publishes were acknowledged."""

    testbed: Testbed
    acknowledged: list[str] = field(default_factory=list)
    attempted: list[str] = field(default_factory=list)  # without an acknowledgement since the last acknowledged one
    refused: list[str] = field(default_factory=list)

    async def publish_repeatedly(self) -> None:
        while True:
            for artifact in ("second", "first"):
                await self.publish(artifact)
                await asyncio.sleep(_PUBLISH_EVERY_S)

    async def publish(self, artifact: str) -> None:
        self.attempted.append(self.testbed.candidate(artifact, "french").adapter.engine_name)
        try:
            self.acknowledged.append(await self.testbed.publish(artifact, "french"))
            self.attempted.clear()
        except httpx.HTTPStatusError as error:
            self.refused.append(error.response.text[:200])
        except httpx.HTTPError as error:
            self.refused.append(repr(error)[:200])

    def is_lost(self, current: str) -> bool:
        """Whether the last acknowledged publish is lost. A publish without an acknowledgement may have taken effect."""
        return bool(self.acknowledged) and current not in {self.acknowledged[-1], *self.attempted}


async def run(
    testbed: Testbed, faults: Sequence[Fault], report: Callable[[str], None], hung_after_s: float = HUNG_AFTER_S
) -> list[FaultResult]:
    report("the server is ready; recording the expected answers")
    await testbed.learn_expected_answers()
    callers = testbed.callers()
    rows = []
    async with callers.running():
        for number, fault in enumerate(faults, 1):
            if fault.has_pool and POOL not in testbed.expected.names:
                await add_pool(testbed)
            report(f"fault {number} of {len(faults)}: {fault.name}")
            row = await run_fault(testbed, callers, fault, hung_after_s)
            report(f"{row.name:45} recovered after {row.recovery_s:5.1f} s   {row.outcomes}   {', '.join(row.alerts)}")
            for reason in row.reasons:
                report(f"    {reason}")
            rows.append(row)
    return rows


async def run_fault(testbed: Testbed, callers: Callers, fault: Fault, hung_after_s: float) -> FaultResult:
    publisher = Publisher(testbed)
    async with _running(publisher.publish_repeatedly()), _running(_collect_alerts(testbed, alerts := set[str]())):
        await asyncio.sleep(BEFORE_S)
        began = callers.now()
        over = await fault.inject(testbed) or time.monotonic()
        await wait_until_recovered(testbed, callers)
        recovery_s = time.monotonic() - over
        await asyncio.sleep(AFTER_S)
        ended = callers.now()
    lost = publisher.is_lost(testbed.current("french"))
    results = [result.judged(hung_after_s + fault.holds_s) for result in callers.between(began, ended)]
    details = [result.detail for result in results if result.outcome != "answered"]
    return FaultResult(
        fault.name,
        count_outcomes(results),
        round(recovery_s, 2),
        len(publisher.acknowledged),
        int(lost),
        tuple(dict(Counter(publisher.refused).most_common(_SHOWN_REASONS))),
        tuple(sorted(alerts)),
        tuple(dict(Counter(details).most_common(_SHOWN_REASONS))),
        len(testbed.orphaned_processes()),
    )


async def wait_until_recovered(testbed: Testbed, callers: Callers) -> None:
    """Return when every replica is ready and holds the current revisions, and a few requests are answered. Raises
    TimeoutError after RECOVERY_TIMEOUT_S."""
    async with asyncio.timeout(RECOVERY_TIMEOUT_S):
        while True:
            if await _replicas_are_current(testbed) and await _callers_are_answered(callers):
                return
            await asyncio.sleep(_POLL_S)


async def _replicas_are_current(testbed: Testbed) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        names = testbed.expected.names.keys() - {POOL}
        current = {await asyncio.to_thread(testbed.current, name) for name in names}
        replicas = await testbed.replicas()
        if POOL in testbed.expected.names and not await is_running(testbed):
            return False
        return len(replicas) == REPLICAS and all(current <= set(replica["resident"]) for replica in replicas)
    return False


async def _callers_are_answered(callers: Callers) -> bool:
    requests = (callers.ask(callers.model(turn), stream=turn % 2 == 0) for turn in range(_REQUESTS_OF_RECOVERY_CHECK))
    return all(result.outcome == "answered" for result in await asyncio.gather(*requests))


async def _collect_alerts(testbed: Testbed, seen: set[str]) -> None:
    while testbed.prometheus:
        with contextlib.suppress(httpx.HTTPError, RuntimeError):
            alerts = await asyncio.to_thread(testbed.prometheus.query, "ALERTS")
            seen |= {f"{alert['metric']['alertname']} ({alert['metric']['alertstate']})" for alert in alerts}
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
