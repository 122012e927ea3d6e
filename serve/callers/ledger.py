"""Counts exactly the requests and tokens of each caller in the last minute, and its running requests.

Every admitted request is an entry with its time and its tokens in a sliding window log: no period of 60 seconds,
whenever it begins, has more than a limit allows. The tokens of an entry are reserved at first: the most that the
request is expected to use. They are corrected when the request has ended. A running request holds a lease, which
expires unless it is renewed. All limits of a request are checked together: it is entered in all of its accounts or in
none.

`Ledger` itself neither waits nor does I/O. Replicas share one in a Ray actor (`serve.callers.ledger_ray`), or use
Redis, where a script does the same (`serve.callers.ledger_redis`).
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal, Protocol

WINDOW_S = 60.0

Kind = Literal["requests", "tokens", "concurrent"]


@dataclass(frozen=True)
class RateLimit:
    """The limits of one account: of a key, or of a key on one model. None: no limit."""

    account: str
    requests: int | None = None  # a minute
    tokens: int | None = None  # a minute
    concurrent: int | None = None


@dataclass(frozen=True)
class Reservation:
    """A request that asks for admission. `tokens`: its prompt, as far as it is known, and all the output it may get."""

    id: str
    tokens: int
    limits: tuple[RateLimit, ...]

    @property
    def accounts(self) -> tuple[str, ...]:
        return tuple(limit.account for limit in self.limits)


@dataclass(frozen=True)
class WindowUsage:
    """The last minute of one account after a decision. `reset_s`: seconds until the window is empty."""

    requests: int
    tokens: int
    reset_s: float


@dataclass(frozen=True)
class Refusal:
    """The first limit that the request would exceed. `retry_after_s`: the earliest time at which it can be admitted; 0
    if running requests that end may make room at any time; None if the time is unknown (concurrent) or never comes
    (more tokens than the limit itself)."""

    limit_index: int  # in the reservation's limits
    kind: Kind
    retry_after_s: float | None
    running_tokens: int = 0  # of the account's, those that are reserved by requests that still run


@dataclass(frozen=True)
class Decision:
    """Whether a request is admitted."""

    refusal: Refusal | None
    usage: tuple[WindowUsage, ...]  # one for each of the reservation's limits


class RateLimitBackend(Protocol):
    """A ledger that all replicas share. Every method raises BackendUnreachable if it can't be reached."""

    async def reserve(self, reservation: Reservation) -> Decision:
        """Enter the request, if all of its limits allow it."""
        ...

    async def settle(self, reservation: Reservation, tokens: int | None) -> None:
        """The request has ended and used this many tokens. None: the number is unknown, so those that
        were reserved stay."""
        ...

    async def withdraw(self, reservation: Reservation) -> None:
        """The request was refused after it had been entered: it counts against no limit."""
        ...

    async def renew(self, reservations: Iterable[Reservation]) -> None:
        """Extend the leases of requests that still run. A lease that has expired, or whose request was settled, is not
        given again."""
        ...


class BackendUnreachable(Exception):
    """The actor or database that holds the ledger does not answer."""


@dataclass
class _Account:
    entries: OrderedDict[str, tuple[float, int]] = field(default_factory=OrderedDict)  # oldest first: time, tokens
    tokens: int = 0  # of all entries
    leases: OrderedDict[str, float] = field(default_factory=OrderedDict)  # when each ends, earliest first

    @property
    def is_empty(self) -> bool:
        return not self.entries and not self.leases

    def drop_expired(self, now_s: float) -> None:
        while self.entries:
            request_id = next(iter(self.entries))
            at_s, tokens = self.entries[request_id]
            if at_s > now_s - WINDOW_S:
                break
            del self.entries[request_id]
            self.tokens -= tokens
        while self.leases:
            request_id = next(iter(self.leases))
            if self.leases[request_id] > now_s:
                break
            del self.leases[request_id]

    def refusal(self, limit_index: int, limit: RateLimit, tokens: int, now_s: float) -> Refusal | None:
        """Why a request of so many tokens is refused; None if the account's limits allow it."""
        if limit.requests is not None and len(self.entries) >= limit.requests:
            requests_over = len(self.entries) - limit.requests + 1
            oldest_s = next(islice(self.entries.values(), requests_over - 1, None))[0]
            return Refusal(limit_index, "requests", oldest_s + WINDOW_S - now_s)
        if limit.tokens is not None and self.tokens + tokens > limit.tokens:
            if tokens > limit.tokens:
                return Refusal(limit_index, "tokens", None)
            running = sum(self.entries[request_id][1] for request_id in self.leases if request_id in self.entries)
            # Running requests give back what they don't use, each at its end, which nobody knows.
            tokens_over = self.tokens - running + tokens - limit.tokens
            return Refusal(limit_index, "tokens", self._tokens_free_after_s(tokens_over, now_s), running)
        if limit.concurrent is not None and len(self.leases) >= limit.concurrent:
            return Refusal(limit_index, "concurrent", None)
        return None

    def enter(self, reservation: Reservation, now_s: float, lease_s: float) -> None:
        self.entries[reservation.id] = (now_s, reservation.tokens)
        self.tokens += reservation.tokens
        self.leases[reservation.id] = now_s + lease_s

    def renew(self, request_id: str, now_s: float, lease_s: float) -> None:
        if self.leases.get(request_id, now_s) > now_s:
            self.leases[request_id] = now_s + lease_s
            self.leases.move_to_end(request_id)

    def settle(self, request_id: str, tokens: int | None) -> None:
        self.leases.pop(request_id, None)
        entry = self.entries.get(request_id)
        if tokens is not None and entry is not None:
            at_s, reserved = entry
            self.entries[request_id] = (at_s, tokens)
            self.tokens += tokens - reserved

    def withdraw(self, request_id: str) -> None:
        self.leases.pop(request_id, None)
        _, tokens = self.entries.pop(request_id, (0.0, 0))
        self.tokens -= tokens

    def usage(self, now_s: float) -> WindowUsage:
        newest_s = self.entries[next(reversed(self.entries))][0] if self.entries else now_s - WINDOW_S
        return WindowUsage(len(self.entries), self.tokens, newest_s + WINDOW_S - now_s)

    def _tokens_free_after_s(self, tokens: int, now_s: float) -> float:
        """Seconds until requests that have ended, the oldest first, have left the window with so many tokens."""
        ended = (entry for request_id, entry in self.entries.items() if request_id not in self.leases)
        while tokens > 0:
            at_s, entry_tokens = next(ended)
            tokens -= entry_tokens
            if tokens <= 0:
                return at_s + WINDOW_S - now_s
        return 0.0


class Ledger:
    """All accounts, in memory."""

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._accounts: dict[str, _Account] = {}
        self._swept_s = 0.0

    def __len__(self) -> int:
        """The number of accounts in memory. An account without entries and leases counts until the next sweep."""
        return len(self._accounts)

    def reserve(self, reservation: Reservation, now_s: float) -> Decision:
        self._sweep(now_s)
        accounts = [self._accounts.setdefault(limit.account, _Account()) for limit in reservation.limits]
        refusal = None
        for index, (account, limit) in enumerate(zip(accounts, reservation.limits, strict=True)):
            account.drop_expired(now_s)
            refusal = refusal or account.refusal(index, limit, reservation.tokens, now_s)
        if refusal is None:
            for account in accounts:
                account.enter(reservation, now_s, self._lease_s)
        return Decision(refusal, tuple(account.usage(now_s) for account in accounts))

    def settle(self, request_id: str, accounts: Iterable[str], tokens: int | None) -> None:
        for account in self._known(accounts):
            account.settle(request_id, tokens)

    def withdraw(self, request_id: str, accounts: Iterable[str]) -> None:
        for account in self._known(accounts):
            account.withdraw(request_id)

    def renew(self, request_id: str, accounts: Iterable[str], now_s: float) -> None:
        for account in self._known(accounts):
            account.renew(request_id, now_s, self._lease_s)

    def _known(self, accounts: Iterable[str]) -> list[_Account]:
        return [self._accounts[name] for name in accounts if name in self._accounts]

    def _sweep(self, now_s: float) -> None:
        """Once a minute, remove the accounts that have neither an entry nor a lease."""
        if now_s - self._swept_s < WINDOW_S:
            return
        self._swept_s = now_s
        for name, account in list(self._accounts.items()):
            account.drop_expired(now_s)
            if account.is_empty:
                del self._accounts[name]


class LocalLedger:
    """`RateLimitBackend` of a single replica, in its own memory."""

    def __init__(self, lease_s: float) -> None:
        self._ledger = Ledger(lease_s)

    async def reserve(self, reservation: Reservation) -> Decision:
        return self._ledger.reserve(reservation, time.monotonic())

    async def settle(self, reservation: Reservation, tokens: int | None) -> None:
        self._ledger.settle(reservation.id, reservation.accounts, tokens)

    async def withdraw(self, reservation: Reservation) -> None:
        self._ledger.withdraw(reservation.id, reservation.accounts)

    async def renew(self, reservations: Iterable[Reservation]) -> None:
        for reservation in reservations:
            self._ledger.renew(reservation.id, reservation.accounts, time.monotonic())
