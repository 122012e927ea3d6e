"""The books of `serve.ledger` in the memory of one actor that all replicas of a Ray cluster ask."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from typing import Any

import ray

from serve.ledger import Claim, Ledger, LedgerUnreachable, Verdict

_NAME = "graft-limits"
_NAMESPACE = "graft"
_TIMEOUT_S = 2.0
_START_TIMEOUT_S = 60.0


@ray.remote(num_cpus=0, max_restarts=-1)
class _Bookkeeper:
    """One thread, so one claim after the other. It forgets everything when it dies: the minute begins anew."""

    def __init__(self, lease_s: float) -> None:
        self._ledger = Ledger(lease_s)

    def reserve(self, claim: Claim) -> Verdict:
        return self._ledger.reserve(claim, time.monotonic())

    def settle(self, claim_id: str, accounts: tuple[str, ...], tokens: int | None) -> None:
        self._ledger.settle(claim_id, accounts, tokens)

    def renew(self, claims: list[tuple[str, tuple[str, ...]]]) -> None:
        now = time.monotonic()
        for claim_id, accounts in claims:
            self._ledger.renew(claim_id, accounts, now)


class ActorLedger:
    """serve.ledger.Ledgers. The actor is made by whoever needs it first."""

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._found: Any = None

    async def prepare(self) -> None:
        """Have the actor run before the first claim: that takes seconds. Raises LedgerUnreachable."""
        await self._answer("renew", [], timeout_s=_START_TIMEOUT_S)

    async def reserve(self, claim: Claim) -> Verdict:
        verdict: Verdict = await self._answer("reserve", claim)
        return verdict

    async def settle(self, claim: Claim, tokens: int | None) -> None:
        await self._answer("settle", claim.id, claim.accounts, tokens)

    async def renew(self, claims: Iterable[Claim]) -> None:
        await self._answer("renew", [(claim.id, claim.accounts) for claim in claims])

    async def _answer(self, method: str, *args: object, timeout_s: float = _TIMEOUT_S) -> Any:
        try:
            actor = self._found or await asyncio.to_thread(self._find)
            return await asyncio.wait_for(getattr(actor, method).remote(*args), timeout_s)
        except (ray.exceptions.RayError, TimeoutError, ValueError) as error:
            self._found = None
            raise LedgerUnreachable(f"the actor {_NAME}: {error!r}") from error

    def _find(self) -> Any:
        options = {"name": _NAME, "namespace": _NAMESPACE, "lifetime": "detached", "get_if_exists": True}
        bookkeeper: Any = _Bookkeeper  # what the decorator makes of the class
        self._found = bookkeeper.options(**options).remote(self._lease_s)
        return self._found
