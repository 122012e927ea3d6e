"""The books of limits, against a list of everything that ever happened, and Redis' script against the books."""

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

from serve.ledger import WINDOW_S, Bound, Claim, Ledger, LedgerUnreachable, Refusal
from serve.ledger_redis import RedisLedger
from tests.redis_server import RedisServer, redis_server

LEASE_S = 10.0
BEGIN_S = 1_000_000.0

LIMIT = st.none() | st.integers(1, 4)
BOUND = st.builds(
    Bound,
    account=st.sampled_from(["a", "b", "a/x", "a/y"]),
    requests=LIMIT,
    tokens=st.none() | st.integers(1, 40),
    concurrent=LIMIT,
)
BOUNDS = st.lists(BOUND, min_size=1, max_size=3, unique_by=lambda bound: bound.account).map(tuple)
RESERVE = st.tuples(st.just("reserve"), BOUNDS, st.integers(0, 45))
SETTLE = st.tuples(st.just("settle"), st.integers(0, 50), st.none() | st.integers(0, 60))
RENEW = st.tuples(st.just("renew"), st.integers(0, 50))
WAIT = st.tuples(st.just("wait"), st.sampled_from([0.001, 1.0, 4.0, 9.999, 30.0, 59.999, 60.0]))
STEPS = st.lists(RESERVE | RESERVE | SETTLE | RENEW | WAIT, max_size=40)


@dataclass
class Everything:
    """Remembers all that was admitted, and adds it up anew for every question."""

    admitted: list[dict[str, Any]] = field(default_factory=list)

    def reserve(self, claim: Claim, now_s: float) -> bool:
        if not all(self._fits(claim, bound, now_s) for bound in claim.bounds):
            return False
        self.admitted.append({
            "id": claim.id, "at": now_s, "tokens": claim.tokens, "accounts": claim.accounts, "lease": now_s + LEASE_S,
        })  # fmt: skip
        return True

    def _fits(self, claim: Claim, bound: Bound, now_s: float) -> bool:
        of_account = [it for it in self.admitted if bound.account in it["accounts"]]
        recent = [it for it in of_account if it["at"] > now_s - WINDOW_S]
        running = [it for it in of_account if it["lease"] > now_s]
        return (
            (bound.requests is None or len(recent) < bound.requests)
            and (bound.tokens is None or sum(it["tokens"] for it in recent) + claim.tokens <= bound.tokens)
            and (bound.concurrent is None or len(running) < bound.concurrent)
        )

    def find(self, claim_id: str) -> dict[str, Any]:
        return next(it for it in self.admitted if it["id"] == claim_id)


@given(STEPS)
@settings(max_examples=300)
def test_what_is_admitted_is_what_adding_everything_up_admits(steps: list[Any]) -> None:
    ledger, everything, now_s, claims = Ledger(LEASE_S), Everything(), BEGIN_S, list[Claim]()

    for verb, *arguments in steps:
        if verb == "wait":
            now_s += arguments[0]
        elif verb == "reserve":
            claim = Claim(str(len(claims)), arguments[1], arguments[0])
            verdict = ledger.reserve(claim, now_s)
            assert (verdict.refusal is None) == everything.reserve(claim, now_s)
            if verdict.refusal is None:
                claims.append(claim)
            elif verdict.refusal.retry_after_s is not None:
                assert 0 < verdict.refusal.retry_after_s <= WINDOW_S
        elif claims:
            claim = claims[arguments[0] % len(claims)]
            if verb == "settle":
                ledger.settle(claim.id, claim.accounts, arguments[1])
                entry = everything.find(claim.id)
                entry["lease"] = 0
                entry["tokens"] = entry["tokens"] if arguments[1] is None else arguments[1]
            elif everything.find(claim.id)["lease"] > now_s:
                ledger.renew(claim.id, claim.accounts, now_s)
                everything.find(claim.id)["lease"] = now_s + LEASE_S


def claim(number: int, uses: int = 0, **limits: int) -> Claim:
    return Claim(str(number), uses, (Bound("a", **limits),))


def test_retry_after_is_when_the_request_gets_through() -> None:
    ledger = Ledger(LEASE_S)
    for number in range(3):
        ledger.reserve(claim(number, 10, requests=3, tokens=30), BEGIN_S + number)

    refused = ledger.reserve(claim(3, 20, requests=9, tokens=30), BEGIN_S + 5).refusal

    assert refused == Refusal(0, "tokens", 56.0), "the first two have to leave"
    assert ledger.reserve(claim(4, 20, tokens=30), BEGIN_S + 5 + 55.9).refusal is not None
    assert ledger.reserve(claim(5, 20, tokens=30), BEGIN_S + 5 + 56.0).refusal is None


def test_what_can_never_get_through_is_not_told_when() -> None:
    assert Ledger(LEASE_S).reserve(claim(0, 31, tokens=30), BEGIN_S).refusal == Refusal(0, "tokens", None)


def test_nothing_is_remembered_of_callers_that_left() -> None:
    ledger = Ledger(LEASE_S)
    for number in range(1000):
        ledger.reserve(Claim(str(number), 1, (Bound(f"caller-{number}", requests=5),)), BEGIN_S + number / 1000)
    assert len(ledger) == 1000

    ledger.reserve(claim(0, requests=1), BEGIN_S + 2 * WINDOW_S + 1)

    assert len(ledger) == 1


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
async def books(redis: RedisServer) -> AsyncIterator[RedisLedger]:
    ledger = RedisLedger(redis.url, LEASE_S)
    await ledger._redis.flushall()
    yield ledger
    await ledger.close()


@given(STEPS)
@settings(max_examples=60)
def test_redis_decides_and_tells_what_the_books_in_memory_do(redis: RedisServer, steps: list[Any]) -> None:
    asyncio.run(compare(redis, steps))


async def compare(redis: RedisServer, steps: list[Any]) -> None:
    """In whole seconds after now, so that nothing expires by Redis' own clock."""
    theirs, ours, now_s, claims = RedisLedger(redis.url, LEASE_S), Ledger(LEASE_S), 4_000_000_000.0, list[Claim]()
    await theirs._redis.flushall()
    for verb, *arguments in steps:
        if verb == "wait":
            now_s += arguments[0]
        elif verb == "reserve":
            claim = Claim(str(len(claims)), arguments[1], arguments[0])
            told, expected = await theirs.reserve(claim, now_s), ours.reserve(claim, now_s)
            assert [(it.requests, it.tokens) for it in told.standings] == [
                (it.requests, it.tokens) for it in expected.standings
            ]
            assert [it.reset_s for it in told.standings] == pytest.approx(
                [it.reset_s for it in expected.standings], abs=0.002
            )
            assert (told.refusal is None) == (expected.refusal is None)
            if told.refusal and expected.refusal:
                assert (told.refusal.bound, told.refusal.kind) == (expected.refusal.bound, expected.refusal.kind)
                assert told.refusal.retry_after_s == pytest.approx(expected.refusal.retry_after_s, abs=0.002)
            else:
                claims.append(claim)
        elif claims:
            claim = claims[arguments[0] % len(claims)]
            if verb == "settle":
                await theirs.settle(claim, arguments[1], now_s)
                ours.settle(claim.id, claim.accounts, arguments[1])
            else:
                await theirs.renew([claim], now_s)
                ours.renew(claim.id, claim.accounts, now_s)
    await theirs.close()


async def test_of_200_at_once_redis_admits_exactly_as_many_as_may(redis: RedisServer, books: RedisLedger) -> None:
    other = RedisLedger(redis.url, LEASE_S)  # another replica

    verdicts = await asyncio.gather(
        *((books, other)[number % 2].reserve(claim(number, 7, requests=50, tokens=1000)) for number in range(200))
    )

    assert sum(verdict.refusal is None for verdict in verdicts) == 50
    assert Counter(it.refusal.kind for it in verdicts if it.refusal) == {"requests": 150}
    await other.close()


async def test_what_has_ended_in_redis_leaves_its_place_and_what_it_did_not_use(books: RedisLedger) -> None:
    assert (await books.reserve(claim(0, 9, concurrent=1, tokens=10))).refusal is None
    assert (await books.reserve(claim(1, 1, concurrent=1, tokens=10))).refusal == Refusal(0, "concurrent", None)

    await books.settle(claim(0, concurrent=1), 4)

    verdict = await books.reserve(claim(2, 6, concurrent=1, tokens=10))
    assert verdict.refusal is None
    assert verdict.standings[0].tokens == 10
    assert (await books.reserve(claim(3, 1, tokens=10))).refusal == Refusal(0, "tokens", ANY)


async def test_a_request_that_used_nothing_leaves_redis_with_its_minute(books: RedisLedger) -> None:
    assert (await books.reserve(claim(0, 9, tokens=10), 1000)).refusal is None
    await books.settle(claim(0, tokens=10), 0, 1000)

    verdict = await books.reserve(claim(1, 9, tokens=10), 1061)

    assert verdict.refusal is None
    assert (verdict.standings[0].requests, verdict.standings[0].tokens) == (1, 9)


async def test_leases_in_redis_end_by_themselves(redis: RedisServer, books: RedisLedger) -> None:
    short = RedisLedger(redis.url, 0.2)
    assert (await short.reserve(claim(0, concurrent=1))).refusal is None
    assert (await short.reserve(claim(1, concurrent=1))).refusal == Refusal(0, "concurrent", None)

    for _ in range(4):
        await asyncio.sleep(0.1)
        await short.renew([claim(0, concurrent=1)])
    assert (await short.reserve(claim(1, concurrent=1))).refusal == Refusal(0, "concurrent", ANY), "it was renewed"
    await asyncio.sleep(0.3)
    assert (await short.reserve(claim(1, concurrent=1))).refusal is None
    await short.close()


async def test_a_redis_that_is_not_there_is_told(tmp_path: Path) -> None:
    books = RedisLedger(f"unix://{tmp_path}/nobody", LEASE_S)

    with pytest.raises(LedgerUnreachable):
        await books.reserve(claim(0, requests=1))


async def test_a_redis_that_stands_still_for_a_moment_is_asked_again_and_counts_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.ledger_redis._TIMEOUT_S", 1.0)
    with redis_server(tmp_path) as server:
        books = RedisLedger(server.url, LEASE_S)
        assert (await books.reserve(claim(0, requests=2))).refusal is None
        server.hang()
        asked = asyncio.create_task(books.reserve(claim(1, requests=2)))
        await asyncio.sleep(1.3)  # the first try is given up, and lies in the server's socket
        server.go_on()

        assert (await asked).refusal is None
        assert (await books.reserve(claim(2, requests=2))).standings[0].requests == 2, "of two, once each"
        await books.close()


async def test_a_redis_that_hangs_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.ledger_redis._TIMEOUT_S", 0.2)
    with redis_server(tmp_path) as server:
        books = RedisLedger(server.url, LEASE_S)
        assert (await books.reserve(claim(0, requests=9))).refusal is None
        server.hang()
        with pytest.raises(LedgerUnreachable):
            await books.reserve(claim(1, requests=9))
        server.go_on()
        assert (await books.reserve(claim(2, requests=9))).refusal is None, "and it is used again when it is back"
        await books.close()
