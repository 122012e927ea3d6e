"""The ledger in memory is compared with a list of all requests, and the ledger in Redis with the one in memory."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.callers.ledger import WINDOW_S, BackendUnreachable, Ledger, RateLimit, Refusal, Reservation
from serve.callers.ledger_redis import RedisLedger
from tests.redis_server import RedisServer, redis_server

LEASE_S = 10.0
BEGIN_S = 1_000_000.0

LIMIT = st.none() | st.integers(1, 4)
RATE_LIMIT = st.builds(
    RateLimit,
    account=st.sampled_from(["a", "b", "a/x", "a/y"]),
    requests=LIMIT,
    tokens=st.none() | st.integers(1, 40),
    concurrent=LIMIT,
)
RATE_LIMITS = st.lists(RATE_LIMIT, min_size=1, max_size=3, unique_by=lambda limit: limit.account).map(tuple)
RESERVE = st.tuples(st.just("reserve"), RATE_LIMITS, st.integers(0, 45))
SETTLE = st.tuples(st.just("settle"), st.integers(0, 50), st.none() | st.integers(0, 60))
WITHDRAW = st.tuples(st.just("withdraw"), st.integers(0, 50))
RENEW = st.tuples(st.just("renew"), st.integers(0, 50))
# Sums of these are exact, in seconds as in whole milliseconds, so that both ledgers see the same time.
WAIT = st.tuples(st.just("wait"), st.sampled_from([0.125, 1.0, 4.0, 9.875, 30.0, 59.875, 60.0]))
STEPS = st.lists(RESERVE | RESERVE | SETTLE | WITHDRAW | RENEW | WAIT, max_size=40)


@dataclass
class Everything:
    """Keeps all admitted requests, and adds them up anew for every decision."""

    admitted: list[dict[str, Any]] = field(default_factory=list)

    def reserve(self, reservation: Reservation, now_s: float) -> bool:
        if not all(self._fits(reservation, limit, now_s) for limit in reservation.limits):
            return False
        self.admitted.append(
            {
                "id": reservation.id,
                "at": now_s,
                "tokens": reservation.tokens,
                "accounts": reservation.accounts,
                "lease": now_s + LEASE_S,
            }
        )
        return True

    def _fits(self, reservation: Reservation, limit: RateLimit, now_s: float) -> bool:
        of_account = [entry for entry in self.admitted if limit.account in entry["accounts"]]
        recent = [entry for entry in of_account if entry["at"] > now_s - WINDOW_S]
        running = [entry for entry in of_account if entry["lease"] > now_s]
        return (
            (limit.requests is None or len(recent) < limit.requests)
            and (limit.tokens is None or sum(entry["tokens"] for entry in recent) + reservation.tokens <= limit.tokens)
            and (limit.concurrent is None or len(running) < limit.concurrent)
        )

    def find(self, request_id: str) -> dict[str, Any]:
        return next(entry for entry in self.admitted if entry["id"] == request_id)


@given(STEPS)
@settings(max_examples=300)
def test_what_is_admitted_is_what_adding_everything_up_admits(steps: list[Any]) -> None:
    ledger, everything, now_s, reservations = Ledger(LEASE_S), Everything(), BEGIN_S, list[Reservation]()

    for verb, *arguments in steps:
        if verb == "wait":
            now_s += arguments[0]
        elif verb == "reserve":
            reservation = Reservation(str(len(reservations)), arguments[1], arguments[0])
            decision = ledger.reserve(reservation, now_s)
            assert (decision.refusal is None) == everything.reserve(reservation, now_s)
            if decision.refusal is None:
                reservations.append(reservation)
            elif decision.refusal.retry_after_s is not None:
                assert 0 <= decision.refusal.retry_after_s <= WINDOW_S
        elif reservations:
            reservation = reservations[arguments[0] % len(reservations)]
            if verb == "settle":
                ledger.settle(reservation.id, reservation.accounts, arguments[1])
                entry = everything.find(reservation.id)
                entry["lease"] = 0
                entry["tokens"] = entry["tokens"] if arguments[1] is None else arguments[1]
            elif verb == "withdraw":
                ledger.withdraw(reservation.id, reservation.accounts)
                everything.find(reservation.id)["at"] = everything.find(reservation.id)["lease"] = 0
            else:
                ledger.renew(reservation.id, reservation.accounts, now_s)
                entry = everything.find(reservation.id)
                entry["lease"] = now_s + LEASE_S if entry["lease"] > now_s else entry["lease"]


def request(number: int, uses: int = 0, **limits: int) -> Reservation:
    return Reservation(str(number), uses, (RateLimit("a", **limits),))


def test_retry_after_is_when_the_request_gets_through() -> None:
    ledger = Ledger(LEASE_S)
    for number in range(3):
        ledger.reserve(request(number, 10, requests=3, tokens=30), BEGIN_S + number)
        ledger.settle(str(number), ["a"], 10)

    refused = ledger.reserve(request(3, 20, requests=9, tokens=30), BEGIN_S + 5).refusal

    assert refused == Refusal(0, "tokens", 56.0), "the first two have to leave"
    assert ledger.reserve(request(4, 20, tokens=30), BEGIN_S + 5 + 55.9).refusal is not None
    assert ledger.reserve(request(5, 20, tokens=30), BEGIN_S + 5 + 56.0).refusal is None


def test_what_running_requests_reserve_may_be_free_at_any_time() -> None:
    ledger = Ledger(LEASE_S)
    ledger.reserve(request(0, 10, tokens=30), BEGIN_S)
    ledger.settle("0", ["a"], 10)
    ledger.reserve(request(1, 15, tokens=30), BEGIN_S + 1)

    assert ledger.reserve(request(2, 20, tokens=30), BEGIN_S + 2).refusal == Refusal(0, "tokens", 0.0, 15)
    assert ledger.reserve(request(2, 25, tokens=30), BEGIN_S + 2).refusal == Refusal(0, "tokens", 58.0, 15)
    ledger.settle("1", ["a"], 0)
    assert ledger.reserve(request(2, 20, tokens=30), BEGIN_S + 2).refusal is None


def test_a_request_that_is_never_admitted_gets_no_time_to_retry() -> None:
    assert Ledger(LEASE_S).reserve(request(0, 31, tokens=30), BEGIN_S).refusal == Refusal(0, "tokens", None)


def test_nothing_is_remembered_of_callers_that_left() -> None:
    ledger = Ledger(LEASE_S)
    for number in range(1000):
        ledger.reserve(
            Reservation(str(number), 1, (RateLimit(f"caller-{number}", requests=5),)), BEGIN_S + number / 1000
        )
    assert len(ledger) == 1000

    ledger.reserve(request(0, requests=1), BEGIN_S + 2 * WINDOW_S + 1)

    assert len(ledger) == 1


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
async def ledger(redis: RedisServer) -> AsyncIterator[RedisLedger]:
    ledger = RedisLedger(redis.url, LEASE_S)
    await ledger._redis.flushall()
    yield ledger
    await ledger.close()


@given(STEPS)
@settings(max_examples=60)
def test_redis_decides_and_reports_as_the_ledger_in_memory_does(redis: RedisServer, steps: list[Any]) -> None:
    asyncio.run(compare(redis, steps))


async def compare(redis: RedisServer, steps: list[Any]) -> None:
    """The time is far in the future, so that no key expires by the clock of Redis."""
    theirs, ours, reservations = RedisLedger(redis.url, LEASE_S), Ledger(LEASE_S), list[Reservation]()
    now_s = 4_000_000_000.0
    await theirs._redis.flushall()
    for verb, *arguments in steps:
        if verb == "wait":
            now_s += arguments[0]
        elif verb == "reserve":
            reservation = Reservation(str(len(reservations)), arguments[1], arguments[0])
            decision, expected = await theirs.reserve(reservation, now_s), ours.reserve(reservation, now_s)
            assert decision == expected
            if decision.refusal is None:
                reservations.append(reservation)
        elif reservations:
            reservation = reservations[arguments[0] % len(reservations)]
            if verb == "settle":
                await theirs.settle(reservation, arguments[1])
                ours.settle(reservation.id, reservation.accounts, arguments[1])
            elif verb == "withdraw":
                await theirs.withdraw(reservation)
                ours.withdraw(reservation.id, reservation.accounts)
            else:
                await theirs.renew([reservation], now_s)
                ours.renew(reservation.id, reservation.accounts, now_s)
    await theirs.close()


async def test_of_200_at_once_redis_admits_exactly_as_many_as_may(redis: RedisServer, ledger: RedisLedger) -> None:
    other = RedisLedger(redis.url, LEASE_S)  # another replica

    decisions = await asyncio.gather(
        *((ledger, other)[number % 2].reserve(request(number, 7, requests=50, tokens=1000)) for number in range(200))
    )

    assert sum(decision.refusal is None for decision in decisions) == 50
    assert Counter(decision.refusal.kind for decision in decisions if decision.refusal) == {"requests": 150}
    await other.close()


async def test_what_has_ended_in_redis_leaves_its_place_and_what_it_did_not_use(ledger: RedisLedger) -> None:
    assert (await ledger.reserve(request(0, 9, concurrent=1, tokens=10))).refusal is None
    assert (await ledger.reserve(request(1, 1, concurrent=1, tokens=10))).refusal == Refusal(0, "concurrent", None)

    await ledger.settle(request(0, concurrent=1), 4)

    decision = await ledger.reserve(request(2, 6, concurrent=1, tokens=10))
    assert decision.refusal is None
    assert decision.usage[0].tokens == 10
    assert (await ledger.reserve(request(3, 1, tokens=10))).refusal == Refusal(0, "tokens", ANY, ANY)


async def test_a_request_that_used_nothing_leaves_redis_with_its_minute(ledger: RedisLedger) -> None:
    assert (await ledger.reserve(request(0, 9, tokens=10), 1000)).refusal is None
    await ledger.settle(request(0, tokens=10), 0)

    decision = await ledger.reserve(request(1, 9, tokens=10), 1061)

    assert decision.refusal is None
    assert (decision.usage[0].requests, decision.usage[0].tokens) == (1, 9)


async def test_leases_in_redis_end_by_themselves(ledger: RedisLedger) -> None:
    running, waiting = request(0, concurrent=1), request(1, concurrent=1)
    now_s = 4_000_000_000.0  # no key expires by the clock of Redis
    assert (await ledger.reserve(running, now_s)).refusal is None
    assert (await ledger.reserve(waiting, now_s + LEASE_S - 1)).refusal == Refusal(0, "concurrent", None)

    await ledger.renew([running], now_s + LEASE_S - 1)
    assert (await ledger.reserve(waiting, now_s + LEASE_S + 1)).refusal == Refusal(0, "concurrent", None)
    assert (await ledger.reserve(waiting, now_s + 2 * LEASE_S)).refusal is None


async def test_a_redis_that_is_not_there_is_reported(tmp_path: Path) -> None:
    ledger = RedisLedger(f"unix://{tmp_path}/nobody", LEASE_S)

    with pytest.raises(BackendUnreachable):
        await ledger.reserve(request(0, requests=1))


async def test_a_redis_that_stands_still_for_a_moment_is_asked_again_and_counts_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.callers.ledger_redis._TIMEOUT_S", 1.0)
    monkeypatch.setattr("serve.callers.ledger_redis._RETRIES", 100)
    with redis_server(tmp_path) as server:
        ledger = RedisLedger(server.url, LEASE_S)
        assert (await ledger.reserve(request(0, requests=2))).refusal is None
        server.hang()
        asked = asyncio.create_task(ledger.reserve(request(1, requests=2)))
        await asyncio.sleep(1.3)  # the first call times out, and waits in the server's socket
        server.go_on()

        assert (await asked).refusal is None
        assert (await ledger.reserve(request(2, requests=2))).usage[0].requests == 2, "of two, once each"
        await ledger.close()


async def test_a_redis_that_hangs_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with redis_server(tmp_path) as server:
        with monkeypatch.context() as patch:
            patch.setattr("serve.callers.ledger_redis._TIMEOUT_S", 0.2)
            hasty = RedisLedger(server.url, LEASE_S)
        monkeypatch.setattr("serve.callers.ledger_redis._TIMEOUT_S", 60.0)
        ledger = RedisLedger(server.url, LEASE_S)
        assert (await ledger.reserve(request(0, requests=9))).refusal is None
        server.hang()
        with pytest.raises(BackendUnreachable):
            await hasty.reserve(request(1, requests=9))
        server.go_on()
        assert (await ledger.reserve(request(2, requests=9))).refusal is None, "and it is used again when it is back"
        await hasty.close()
        await ledger.close()


async def test_a_settled_lease_is_not_given_again_by_a_late_renewal(ledger: RedisLedger) -> None:
    memory, first, second = Ledger(LEASE_S), request(0, concurrent=1), request(1, concurrent=1)
    assert (await ledger.reserve(first, 1000)).refusal is memory.reserve(first, 1000).refusal is None

    await ledger.settle(first, None)
    await ledger.renew([first], 1001)
    memory.settle(first.id, first.accounts, None)
    memory.renew(first.id, first.accounts, 1001)

    assert (await ledger.reserve(second, 1001)).refusal is None
    assert memory.reserve(second, 1001).refusal is None
