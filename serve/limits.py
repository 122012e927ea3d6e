"""The limits of keys: what a request claims, whether it may, what its answer tells, and what it used in the end."""

from __future__ import annotations

import asyncio
import logging
import math
import uuid
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from serve.errors import LimitsUnavailable, RateLimited
from serve.keys import Allowance, Key
from serve.ledger import Bound, Claim, Ledgers, LedgerUnreachable, Verdict
from serve.tokens import Tokens

# The end of a caller's last request may still be on its way to the books when its next one arrives.
_SECOND_LOOK_S = 0.05
_UNITS = {"requests": "requests per minute", "tokens": "tokens per minute", "concurrent": "concurrent requests"}
# What OpenAI says in `type`; it has no limit of concurrent requests.
_TYPES = {"requests": "requests", "tokens": "tokens", "concurrent": "requests"}
_NEVER = {"x-should-retry": "false"}  # what OpenAI's clients look at before they try again

logger = logging.getLogger(__name__)


@dataclass
class Admitted:
    """A request that may run. `headers`: what its answer tells of its limits."""

    headers: dict[str, str] = field(default_factory=dict)
    _limiter: Limiter | None = None
    _claim: Claim | None = None

    async def settle(self, tokens: int | None) -> None:
        """It has ended and used so many; None: nobody knows. Only the first call counts."""
        if self._claim and self._limiter:
            claim, self._claim = self._claim, None
            await self._limiter.settle(claim, tokens)


class Limiter:
    """Asks the books, keeps the leases of what runs here, and decides what happens while they can't be asked."""

    def __init__(self, ledgers: Ledgers, lease_s: float, *, refuses_when_unavailable: bool = True) -> None:
        self._ledgers = ledgers
        self._lease_s = lease_s
        self._refuses = refuses_when_unavailable
        self._running: dict[str, Claim] = {}
        self._renewing: asyncio.Task[None] | None = None
        self._settling: set[asyncio.Task[None]] = set()
        self._told = False

    @property
    def running(self) -> int:
        """Requests here that hold a lease."""
        return len(self._running)

    @asynccontextmanager
    async def within(self, bounds: tuple[Bound, ...], tokens: int, used: Tokens) -> AsyncIterator[Admitted]:
        """One request, from its admission to its end; `tokens` is what it may use at most, `used` what it has.

        Raises RateLimited, or LimitsUnavailable. Without bounds nobody is asked.
        """
        admitted = await self._admit(Claim(uuid.uuid4().hex, tokens, bounds)) if bounds else Admitted()
        try:
            yield admitted
        except asyncio.CancelledError:
            # Broken off before the engine told a number: what was reserved counts, or breaking off would be free.
            await self._finish(admitted, used.total or None)
            raise
        except BaseException:
            await self._finish(admitted, used.total)
            raise
        await self._finish(admitted, used.total)

    async def settle(self, claim: Claim, tokens: int | None) -> None:
        self._running.pop(claim.id, None)
        try:
            await self._ledgers.settle(claim, tokens)
        except LedgerUnreachable as error:
            self._tell(error)  # the lease ends by itself, and what was reserved leaves with its minute

    async def _admit(self, claim: Claim) -> Admitted:
        try:
            verdict = await self._ledgers.reserve(claim)
            if verdict.refusal and verdict.refusal.kind == "concurrent":
                await asyncio.sleep(_SECOND_LOOK_S)
                verdict = await self._ledgers.reserve(claim)
        except LedgerUnreachable as error:
            self._tell(error)
            if self._refuses:
                raise LimitsUnavailable from error
            return Admitted()
        except asyncio.CancelledError:
            # It may have been entered while its caller left.
            self._in_background(self.settle(claim, 0))
            raise
        self._told = False
        headers = headers_of(claim, verdict)
        if verdict.refusal:
            raise _refusal(claim, verdict, headers)
        self._running[claim.id] = claim
        if self._renewing is None or self._renewing.done():
            self._renewing = asyncio.create_task(self._renew())
        return Admitted(headers, self, claim)

    async def _finish(self, admitted: Admitted, tokens: int | None) -> None:
        """Whatever happens to the task of the request: its place is given back."""
        await asyncio.shield(self._in_background(admitted.settle(tokens)))

    def _in_background(self, settling: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(settling)
        self._settling.add(task)
        task.add_done_callback(self._settling.discard)
        return task

    async def _renew(self) -> None:
        """As long as something runs. A replica that dies stops, and its leases end."""
        while self._running:
            await asyncio.sleep(self._lease_s / 3)
            try:
                await self._ledgers.renew(list(self._running.values()))
            except LedgerUnreachable as error:
                self._tell(error)

    def _tell(self, error: LedgerUnreachable) -> None:
        """An outage is told once, when it begins."""
        if not self._told:
            what = "refused" if self._refuses else "let in without limits"
            logger.error("limits can't be counted, callers that have some are %s: %s", what, error)
        self._told = True


def bounds_of(key: Key | None, model: str) -> tuple[Bound, ...]:
    """The limits that a request of the key for the model is under; empty if there are none."""
    if key is None:
        return ()
    accounts = ((key.id, key.limits), (f"{key.id}/{model}", key.limits_of(model)))
    return tuple(_bound(account, limits) for account, limits in accounts if not limits.is_unlimited)


def headers_of(claim: Claim, verdict: Verdict) -> dict[str, str]:
    """OpenAI's headers, each from the limit that leaves least."""
    headers: dict[str, str] = {}
    for kind in ("requests", "tokens"):
        left = [
            (limit - getattr(standing, kind), limit, standing.reset_s)
            for bound, standing in zip(claim.bounds, verdict.standings, strict=True)
            if (limit := getattr(bound, kind)) is not None
        ]
        if left:
            remaining, limit, reset_s = min(left)
            headers[f"x-ratelimit-limit-{kind}"] = str(limit)
            headers[f"x-ratelimit-remaining-{kind}"] = str(max(0, remaining))
            headers[f"x-ratelimit-reset-{kind}"] = f"{math.ceil(max(0.0, reset_s))}s"
    return headers


def smallest_token_limit(bounds: tuple[Bound, ...]) -> int | None:
    return min((bound.tokens for bound in bounds if bound.tokens is not None), default=None)


def _refusal(claim: Claim, verdict: Verdict, headers: dict[str, str]) -> RateLimited:
    refusal = verdict.refusal
    assert refusal is not None
    bound = claim.bounds[refusal.bound]
    key, _, model = bound.account.partition("/")
    limit = getattr(bound, refusal.kind)
    who = f"the key `{key}`" + (f" on `{model}`" if model else "")
    told = f"Rate limit reached for {who}: {limit} {_UNITS[refusal.kind]}."
    if refusal.kind == "tokens" and refusal.retry_after_s is None:
        told += f" This request may use {claim.tokens}, which is more than that: ask for less output, or send less."
        return RateLimited(told, _TYPES[refusal.kind], None, headers | _NEVER)
    after = 1 if refusal.retry_after_s is None else max(1, math.ceil(refusal.retry_after_s))
    return RateLimited(f"{told} Try again in {after} s.", _TYPES[refusal.kind], after, headers)


def _bound(account: str, limits: Allowance) -> Bound:
    return Bound(account, limits.requests_per_minute, limits.tokens_per_minute, limits.concurrent_requests)
