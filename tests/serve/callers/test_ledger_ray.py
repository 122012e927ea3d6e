"""The books in a real actor of a real Ray, asked by other processes as replicas are."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serve.ledger import Bound, Claim, LedgerUnreachable, Refusal

LEASE_S = 1.0


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """One of its own, gone in the end. Sockets lie below its directory: a short name."""
    patch = pytest.MonkeyPatch()
    for name, value in (("RAY_AUTH_MODE", "disabled"), ("RAY_USAGE_STATS_ENABLED", "0")):
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
        runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).parents[2])}},
    )
    yield ray
    ray.shutdown()
    shutil.rmtree(directory, ignore_errors=True)
    patch.undo()


def claim(number: int, **limits: int) -> Claim:
    return Claim(str(number), 0, (Bound("a", **limits),))


def replica(ray: Any) -> Any:
    """A process of its own that asks the books."""

    @ray.remote(num_cpus=0)
    class Replica:
        async def reserve(self, numbers: range, account: str, limits: dict[str, int]) -> int:
            """How many of so many at once were admitted."""
            from serve.ledger_actor import ActorLedger

            books = ActorLedger(LEASE_S)
            await books.prepare()
            claims = [Claim(str(number), 0, (Bound(account, **limits),)) for number in numbers]
            verdicts = await asyncio.gather(*(books.reserve(it) for it in claims))
            return sum(verdict.refusal is None for verdict in verdicts)

    return Replica.remote()


def test_of_200_at_once_from_two_replicas_exactly_as_many_as_may_are_admitted(ray: Any) -> None:
    replicas = [replica(ray), replica(ray)]

    admitted = ray.get([
        it.reserve.remote(range(number * 100, number * 100 + 100), "both", {"requests": 50})
        for number, it in enumerate(replicas)
    ])  # fmt: skip

    assert sum(admitted) == 50


async def test_leases_of_a_replica_that_is_killed_end_by_themselves(ray: Any) -> None:
    from serve.ledger_actor import ActorLedger

    books, victim = ActorLedger(LEASE_S), replica(ray)
    assert await victim.reserve.remote(range(2), "a", {"concurrent": 2}) == 2
    ray.kill(victim)
    assert (await books.reserve(claim(2, concurrent=2))).refusal == Refusal(0, "concurrent", None)

    await asyncio.sleep(LEASE_S + 0.1)

    assert (await books.reserve(claim(3, concurrent=2))).refusal is None
    await books.settle(claim(3, concurrent=2), 0)


async def test_leases_are_renewed_and_settled(ray: Any) -> None:
    from serve.ledger_actor import ActorLedger

    books = ActorLedger(LEASE_S)
    running = Claim("long", 10, (Bound("b", concurrent=1, tokens=12),))
    assert (await books.reserve(running)).refusal is None
    for _ in range(4):
        await asyncio.sleep(LEASE_S / 2)
        await books.renew([running])
    waiting = Claim("next", 5, running.bounds)
    assert (await books.reserve(waiting)).refusal == Refusal(0, "tokens", pytest.approx(58, abs=2))

    await books.settle(running, 7)

    assert (await books.reserve(waiting)).refusal is None


async def test_books_that_are_lost_are_told_and_then_begun_anew(ray: Any) -> None:
    from serve.ledger_actor import ActorLedger

    books = ActorLedger(LEASE_S)
    assert (await books.reserve(claim(10, requests=9))).refusal is None
    ray.kill(books._found, no_restart=False)

    admitted = False
    async with asyncio.timeout(60):
        while not admitted:  # the old ones have more than that, and while there are none a caller is told so
            with contextlib.suppress(LedgerUnreachable):
                admitted = (await books.reserve(claim(11, requests=1))).refusal is None
            await asyncio.sleep(0.1)
