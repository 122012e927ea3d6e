"""The ledger in an actor of a real Ray, called by other processes as replicas do."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serve.callers.ledger import BackendUnreachable, RateLimit, Reservation

LEASE_S = 1.0


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """A Ray of its own, which is stopped at the end. Its directory has a short name, because it holds sockets."""
    patch = pytest.MonkeyPatch()
    for name, value in (
        ("RAY_AUTH_MODE", "disabled"),
        ("RAY_USAGE_STATS_ENABLED", "0"),
        ("RAY_raylet_start_wait_time_s", "300"),  # on a busy machine
    ):
        patch.setenv(name, value)
    import ray

    directory = Path(tempfile.mkdtemp(prefix="graft-test-"))
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=100 << 20,
        logging_level="CRITICAL",
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
        _temp_dir=str(directory),
        runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).parents[3])}},
    )
    yield ray
    ray.shutdown()
    shutil.rmtree(directory, ignore_errors=True)
    patch.undo()


def request(number: int, **limits: int) -> Reservation:
    return Reservation(str(number), 0, (RateLimit("a", **limits),))


def replica(ray: Any) -> Any:
    """Another process that calls the ledger."""

    @ray.remote(num_cpus=0)
    class Replica:
        async def reserve(self, numbers: range, account: str, limits: dict[str, int]) -> int:
            """Reserve all of them at once; how many were admitted."""
            from serve.callers import ledger_ray

            ledger_ray._TIMEOUT_S = 60.0  # on a busy machine
            ledger = ledger_ray.ActorLedger(LEASE_S)
            await ledger.prepare()
            reservations = [Reservation(str(number), 0, (RateLimit(account, **limits),)) for number in numbers]
            decisions = await asyncio.gather(*(ledger.reserve(reservation) for reservation in reservations))
            return sum(decision.refusal is None for decision in decisions)

    return Replica.remote()


def test_of_200_at_once_from_two_replicas_exactly_as_many_as_may_are_admitted(ray: Any) -> None:
    replicas = [replica(ray), replica(ray)]

    admitted = ray.get([
        actor.reserve.remote(range(number * 100, number * 100 + 100), "both", {"requests": 50})
        for number, actor in enumerate(replicas)
    ])  # fmt: skip

    assert sum(admitted) == 50


async def test_leases_of_a_replica_that_is_killed_end_by_themselves(ray: Any) -> None:
    from serve.callers.ledger_ray import ActorLedger

    ledger, victim = ActorLedger(LEASE_S), replica(ray)
    assert await victim.reserve.remote(range(2), "a", {"concurrent": 2}) == 2
    ray.kill(victim)

    await asyncio.sleep(LEASE_S + 0.1)

    assert (await ledger.reserve(request(3, concurrent=2))).refusal is None
    await ledger.settle(request(3, concurrent=2), 0)


async def test_leases_are_renewed_and_settled(ray: Any) -> None:
    from serve.callers.ledger_ray import ActorLedger

    ledger = ActorLedger(LEASE_S)
    running = Reservation("long", 10, (RateLimit("b", concurrent=1, tokens=12),))
    assert (await ledger.reserve(running)).refusal is None
    for _ in range(4):
        await asyncio.sleep(LEASE_S / 2)
        await ledger.renew([running])
    waiting = Reservation("next", 5, running.limits)
    refusal = (await ledger.reserve(waiting)).refusal
    assert refusal is not None
    assert refusal.kind == "tokens"

    await ledger.settle(running, 7)

    assert (await ledger.reserve(waiting)).refusal is None
    await ledger.withdraw(waiting)
    assert (await ledger.reserve(Reservation("last", 5, running.limits))).refusal is None


async def test_lost_counts_are_reported_and_counting_begins_anew(ray: Any) -> None:
    from serve.callers.ledger_ray import ActorLedger

    ledger = ActorLedger(LEASE_S)
    assert (await ledger.reserve(request(10, requests=9))).refusal is None
    ray.kill(ledger._actor, no_restart=False)

    admitted = False
    async with asyncio.timeout(60):
        while not admitted:  # the lost ledger would refuse it, and the call fails until Ray has started the actor again
            with contextlib.suppress(BackendUnreachable):
                admitted = (await ledger.reserve(request(11, requests=1))).refusal is None
            await asyncio.sleep(0.1)
