"""The limits of keys: admits requests by the shared ledger, and tells callers their limits in headers and errors."""

from __future__ import annotations

import asyncio
import logging
import math
import uuid
from collections.abc import AsyncIterator, Awaitable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from serve.callers.keys import Key
from serve.callers.ledger import BackendUnreachable, Decision, RateLimit, RateLimitBackend, Refusal, Reservation
from serve.engine.token_counter import Tokens
from serve.errors import LimitsUnavailable, RateLimited, ServeError
from serve.settings import Allowance

# When a caller's next request arrives, the settlement of its last one may still be on its way to the backend.
_RETRY_CONCURRENT_AFTER_S = 0.05
_UNITS = {"requests": "requests per minute", "tokens": "tokens per minute", "concurrent": "concurrent requests"}
# The `type` of OpenAI's errors. OpenAI has no limit of concurrent requests.
_TYPES = {"requests": "requests", "tokens": "tokens", "concurrent": "requests"}
_NO_RETRY = {"x-should-retry": "false"}  # OpenAI's clients read this header before they try again

logger = logging.getLogger(__name__)


@dataclass
class Admitted:
    """A request that may run. `headers`: its limits, for the response."""

    headers: dict[str, str] = field(default_factory=dict)
    _limiter: Limiter | None = None
    _reservation: Reservation | None = None

    async def settle(self, tokens: int | None) -> None:
        """The request has ended and used this many tokens; None: unknown. Only the first call of a method counts."""
        if self._reservation and self._limiter:
            reservation, self._reservation = self._reservation, None
            await self._limiter.settle(reservation, tokens)

    async def withdraw(self) -> None:
        """The request was refused after all, and counts against no limit."""
        if self._reservation and self._limiter:
            reservation, self._reservation = self._reservation, None
            await self._limiter.withdraw(reservation)


class Limiter:
    """Admits requests by the backend's decisions, renews the leases of running requests, and decides for itself while
    the backend can't be reached."""

    def __init__(self, backend: RateLimitBackend, lease_s: float, *, refuses_when_unavailable: bool = True) -> None:
        self._backend = backend
        self._lease_s = lease_s
        self._refuses = refuses_when_unavailable
        self._running: dict[str, Reservation] = {}
        self._renewing: asyncio.Task[None] | None = None
        self._settling: set[asyncio.Task[None]] = set()
        self._outage_logged = False

    @property
    def running(self) -> int:
        """Requests of this replica that hold a lease."""
        return len(self._running)

    @asynccontextmanager
    async def admit(self, limits: tuple[RateLimit, ...], tokens: int, used: Tokens) -> AsyncIterator[Admitted]:
        """Admits one request until the block ends. `tokens`: the most that it may use; `used`: what it has used so far.

        Without limits the backend is not asked. A request that the block refuses, by a ServeError, counts against no
        limit. Raises RateLimited or LimitsUnavailable.
        """
        admitted = await self._reserve(Reservation(uuid.uuid4().hex, tokens, limits)) if limits else Admitted()
        try:
            yield admitted
        except asyncio.CancelledError:
            # The caller left, perhaps before the engine reported any tokens. Then the reserved tokens count: otherwise
            # a caller could avoid its limit by leaving early.
            await self._finish(admitted.settle(used.total or None))
            raise
        except ServeError:
            await self._finish(admitted.withdraw())
            raise
        except BaseException:
            await self._finish(admitted.settle(used.total))
            raise
        await self._finish(admitted.settle(used.total))

    async def settle(self, reservation: Reservation, tokens: int | None) -> None:
        await self._end(reservation, self._backend.settle(reservation, tokens))

    async def withdraw(self, reservation: Reservation) -> None:
        await self._end(reservation, self._backend.withdraw(reservation))

    async def _end(self, reservation: Reservation, change: Awaitable[None]) -> None:
        self._running.pop(reservation.id, None)
        try:
            await change
        except Exception as error:  # the answer of the request is not affected
            self._log_outage(error)  # the lease expires, and the reserved tokens leave the window after a minute

    async def _reserve(self, reservation: Reservation) -> Admitted:
        try:
            decision = await self._decide(reservation)
        except BackendUnreachable as error:
            self._log_outage(error)
            if self._refuses:
                raise LimitsUnavailable from error
            return Admitted()
        except asyncio.CancelledError:
            # The caller left, but the backend may have entered the request.
            self._in_background(self.settle(reservation, 0))
            raise
        self._outage_logged = False
        headers = headers_of(reservation, decision)
        if decision.refusal:
            used = decision.usage[decision.refusal.limit_index].tokens - decision.refusal.running_tokens
            raise _rate_limited(reservation, decision.refusal, used, headers)
        self._running[reservation.id] = reservation
        if self._renewing is None or self._renewing.done():
            self._renewing = asyncio.create_task(self._renew_leases())
        return Admitted(headers, self, reservation)

    async def _decide(self, reservation: Reservation) -> Decision:
        decision = await self._backend.reserve(reservation)
        if decision.refusal and decision.refusal.kind == "concurrent":
            await asyncio.sleep(_RETRY_CONCURRENT_AFTER_S)
            decision = await self._backend.reserve(reservation)
        return decision

    async def _finish(self, settling: Coroutine[Any, Any, None]) -> None:
        """Settle or withdraw the request even if its task is cancelled."""
        await asyncio.shield(self._in_background(settling))

    def _in_background(self, settling: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(settling)
        self._settling.add(task)
        task.add_done_callback(self._settling.discard)
        return task

    async def _renew_leases(self) -> None:
        """Renew while requests run. The leases of a replica that dies expire."""
        while self._running:
            await asyncio.sleep(self._lease_s / 3)
            try:
                await self._backend.renew(list(self._running.values()))
            except Exception as error:  # any error may be over at the next attempt, and the leases would expire
                self._log_outage(error)

    def _log_outage(self, error: Exception) -> None:
        """Log an outage once, when it begins."""
        if not self._outage_logged:
            consequence = "refused" if self._refuses else "admitted without a check"
            logger.error("rate limits can't be checked, requests of callers with limits are %s: %s", consequence, error)
        self._outage_logged = True


def rate_limits_of(key: Key | None, model: str) -> tuple[RateLimit, ...]:
    """The limits of a key's request for a model; empty if there are none."""
    if key is None:
        return ()
    allowances = ((key.id, key.limits), (f"{key.id}/{model}", key.limits_of(model)))
    return tuple(_rate_limit(account, allowance) for account, allowance in allowances if not allowance.is_unlimited)


def smallest_token_limit(limits: tuple[RateLimit, ...]) -> int | None:
    return min((limit.tokens for limit in limits if limit.tokens is not None), default=None)


def headers_of(reservation: Reservation, decision: Decision) -> dict[str, str]:
    """OpenAI's rate limit headers, each for the limit with the least remaining."""
    headers: dict[str, str] = {}
    for kind in ("requests", "tokens"):
        limits = [
            (most - getattr(usage, kind), most, usage.reset_s)
            for limit, usage in zip(reservation.limits, decision.usage, strict=True)
            if (most := getattr(limit, kind)) is not None
        ]
        if limits:
            remaining, most, reset_s = min(limits)
            headers[f"x-ratelimit-limit-{kind}"] = str(most)
            headers[f"x-ratelimit-remaining-{kind}"] = str(max(0, remaining))
            headers[f"x-ratelimit-reset-{kind}"] = f"{math.ceil(max(0.0, reset_s))}s"
    return headers


def _rate_limited(reservation: Reservation, refusal: Refusal, used_tokens: int, headers: dict[str, str]) -> RateLimited:
    """The error of a refused request. `used_tokens`: of the requests that have ended in the last minute."""
    limit = reservation.limits[refusal.limit_index]
    key, _, model = limit.account.partition("/")
    owner = f"the key `{key}`" + (f" on `{model}`" if model else "")
    message = f"Rate limit reached for {owner}: {getattr(limit, refusal.kind)} {_UNITS[refusal.kind]}."
    error_type = _TYPES[refusal.kind]
    if refusal.kind == "tokens":
        needs = f"This request reserves {reservation.tokens}, for its prompt and the most output that it may get"
        if refusal.retry_after_s is None:
            message += f" {needs}, which is more than that: ask for less output, or send less."
            return RateLimited(message, error_type, None, headers | _NO_RETRY)
        message += f" {used_tokens} are used and {refusal.running_tokens} reserved by running requests. {needs}."
    retry_after_s = 1 if refusal.retry_after_s is None else max(1, math.ceil(refusal.retry_after_s))
    return RateLimited(f"{message} Try again in {retry_after_s} s.", error_type, retry_after_s, headers)


def _rate_limit(account: str, allowance: Allowance) -> RateLimit:
    return RateLimit(account, allowance.requests_per_minute, allowance.tokens_per_minute, allowance.concurrent_requests)
