"""What callers used in the last minute and what of theirs runs now, counted exactly.

Every admitted request is an entry with its time and its tokens, so that no 60 seconds ever hold more than a limit
allows, wherever they begin. Tokens are entered as an upper bound and corrected when the request has ended. A request
that runs is a lease, which ends by itself if nobody renews it. All limits of a request are checked together: it is
entered everywhere or nowhere.

Nothing here waits or does I/O; two places keep these books for all replicas: an actor, and Redis, whose script does
the same (`serve.ledger_redis`).
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, Protocol

WINDOW_S = 60.0

Kind = Literal["requests", "tokens", "concurrent"]


@dataclass(frozen=True)
class Bound:
    """The limits of one account: of a key, or of a key on one model. None: no limit."""

    account: str
    requests: int | None = None  # a minute
    tokens: int | None = None  # a minute
    concurrent: int | None = None


@dataclass(frozen=True)
class Claim:
    """A request that wants in. `tokens` is an upper bound of what it will use."""

    id: str
    tokens: int
    bounds: tuple[Bound, ...]

    @property
    def accounts(self) -> tuple[str, ...]:
        return tuple(bound.account for bound in self.bounds)


@dataclass(frozen=True)
class Standing:
    """One account after a claim was decided on. Seconds until nothing of the last minute counts any more."""

    requests: int
    tokens: int
    reset_s: float


@dataclass(frozen=True)
class Refusal:
    """The first limit that was in the way. `retry_after_s`: when it no longer will be, if nothing else comes; None
    where nobody knows (concurrent) or it never will (more tokens than the limit itself)."""

    bound: int  # of the claim's
    kind: Kind
    retry_after_s: float | None


@dataclass(frozen=True)
class Verdict:
    refusal: Refusal | None
    standings: tuple[Standing, ...]  # of the claim's bounds


class Ledgers(Protocol):
    """Books shared by all replicas. Every method raises LedgerUnreachable if they can't be reached."""

    async def reserve(self, claim: Claim) -> Verdict: ...

    async def settle(self, claim: Claim, tokens: int | None) -> None:
        """The request has ended and used so many; None: nobody knows, so the upper bound stays."""
        ...

    async def renew(self, claims: Iterable[Claim]) -> None:
        """These still run."""
        ...


class LedgerUnreachable(Exception):
    """Whoever keeps the books does not answer."""


@dataclass
class _Account:
    entries: OrderedDict[str, tuple[float, int]] = field(default_factory=OrderedDict)  # oldest first: time, tokens
    tokens: int = 0
    leases: OrderedDict[str, float] = field(default_factory=OrderedDict)  # the first to end first

    def forget_what_is_over(self, now_s: float) -> None:
        while self.entries:
            key = next(iter(self.entries))
            at_s, tokens = self.entries[key]
            if at_s > now_s - WINDOW_S:
                break
            del self.entries[key]
            self.tokens -= tokens
        while self.leases:
            key = next(iter(self.leases))
            if self.leases[key] > now_s:
                break
            del self.leases[key]

    def objection(self, number: int, bound: Bound, tokens: int, now_s: float) -> Refusal | None:
        if bound.requests is not None and len(self.entries) >= bound.requests:
            return Refusal(number, "requests", self._free_after_s(len(self.entries) - bound.requests + 1, 0, now_s))
        if bound.tokens is not None and self.tokens + tokens > bound.tokens:
            after = (
                self._free_after_s(0, self.tokens + tokens - bound.tokens, now_s) if tokens <= bound.tokens else None
            )
            return Refusal(number, "tokens", after)
        if bound.concurrent is not None and len(self.leases) >= bound.concurrent:
            return Refusal(number, "concurrent", None)
        return None

    def _free_after_s(self, requests: int, tokens: int, now_s: float) -> float:
        """When so many of the oldest entries, with so many tokens, have left the window."""
        for at_s, used in self.entries.values():
            requests -= 1
            tokens -= used
            if requests <= 0 and tokens <= 0:
                return at_s + WINDOW_S - now_s
        return WINDOW_S

    def standing(self, now_s: float) -> Standing:
        last_s = self.entries[next(reversed(self.entries))][0] if self.entries else now_s - WINDOW_S
        return Standing(len(self.entries), self.tokens, last_s + WINDOW_S - now_s)

    @property
    def is_empty(self) -> bool:
        return not self.entries and not self.leases


class Ledger:
    """The books in memory."""

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._accounts: dict[str, _Account] = {}
        self._swept_s = 0.0

    def __len__(self) -> int:
        """Accounts that it remembers anything of."""
        return len(self._accounts)

    def reserve(self, claim: Claim, now_s: float) -> Verdict:
        self._sweep(now_s)
        accounts = [self._accounts.setdefault(bound.account, _Account()) for bound in claim.bounds]
        refusal = None
        for number, (account, bound) in enumerate(zip(accounts, claim.bounds, strict=True)):
            account.forget_what_is_over(now_s)
            refusal = refusal or account.objection(number, bound, claim.tokens, now_s)
        if refusal is None:
            for account in accounts:
                account.entries[claim.id] = (now_s, claim.tokens)
                account.tokens += claim.tokens
                account.leases[claim.id] = now_s + self._lease_s
        return Verdict(refusal, tuple(account.standing(now_s) for account in accounts))

    def settle(self, claim_id: str, accounts: Iterable[str], tokens: int | None) -> None:
        for account in self._known(accounts):
            account.leases.pop(claim_id, None)
            if tokens is not None and (entry := account.entries.get(claim_id)):
                account.entries[claim_id] = (entry[0], tokens)
                account.tokens += tokens - entry[1]

    def renew(self, claim_id: str, accounts: Iterable[str], now_s: float) -> None:
        for account in self._known(accounts):
            account.leases.pop(claim_id, None)
            account.leases[claim_id] = now_s + self._lease_s

    def _known(self, accounts: Iterable[str]) -> list[_Account]:
        return [self._accounts[name] for name in accounts if name in self._accounts]

    def _sweep(self, now_s: float) -> None:
        """Once a minute, forget the accounts of callers that left."""
        if now_s - self._swept_s < WINDOW_S:
            return
        self._swept_s = now_s
        for name, account in list(self._accounts.items()):
            account.forget_what_is_over(now_s)
            if account.is_empty:
                del self._accounts[name]


class LocalLedger:
    """Ledgers of a replica that is alone."""

    def __init__(self, lease_s: float) -> None:
        self._ledger = Ledger(lease_s)

    async def reserve(self, claim: Claim) -> Verdict:
        return self._ledger.reserve(claim, time.monotonic())

    async def settle(self, claim: Claim, tokens: int | None) -> None:
        self._ledger.settle(claim.id, claim.accounts, tokens)

    async def renew(self, claims: Iterable[Claim]) -> None:
        for claim in claims:
            self._ledger.renew(claim.id, claim.accounts, time.monotonic())
