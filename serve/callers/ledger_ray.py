"""The ledger of `serve.callers.ledger` in the memory of one actor, which all replicas of a Ray cluster share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from typing import Any

import ray

from serve.callers.ledger import BackendUnreachable, Decision, Ledger, Reservation

_NAME = "graft-limits"
_NAMESPACE = "graft"
_TIMEOUT_S = 2.0
_START_TIMEOUT_S = 60.0


@ray.remote(num_cpus=0, max_restarts=-1)
class _LedgerActor:
    """The Ray actor. It has one thread, so reservations are decided one after the other. If the actor dies, its ledger
    is lost: Ray starts it again with an empty ledger, as if nothing had been used in the last minute."""

    def __init__(self, lease_s: float) -> None:
        self._ledger = Ledger(lease_s)

    def reserve(self, reservation: Reservation) -> Decision:
        return self._ledger.reserve(reservation, time.monotonic())

    def settle(self, request_id: str, accounts: tuple[str, ...], tokens: int | None) -> None:
        self._ledger.settle(request_id, accounts, tokens)

    def withdraw(self, request_id: str, accounts: tuple[str, ...]) -> None:
        self._ledger.withdraw(request_id, accounts)

    def renew(self, running: list[tuple[str, tuple[str, ...]]]) -> None:
        now = time.monotonic()
        for request_id, accounts in running:
            self._ledger.renew(request_id, accounts, now)


class ActorLedger:
    """`serve.callers.ledger.RateLimitBackend`. The first replica that needs the actor starts it."""

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._actor: Any = None

    async def prepare(self) -> None:
        """Start the actor, which takes seconds, before the first request needs it. Raises BackendUnreachable."""
        await self._call("renew", [], timeout_s=_START_TIMEOUT_S)

    async def reserve(self, reservation: Reservation) -> Decision:
        decision: Decision = await self._call("reserve", reservation)
        return decision

    async def settle(self, reservation: Reservation, tokens: int | None) -> None:
        await self._call("settle", reservation.id, reservation.accounts, tokens)

    async def withdraw(self, reservation: Reservation) -> None:
        await self._call("withdraw", reservation.id, reservation.accounts)

    async def renew(self, reservations: Iterable[Reservation]) -> None:
        await self._call("renew", [(reservation.id, reservation.accounts) for reservation in reservations])

    async def _call(self, method: str, *args: object, timeout_s: float = _TIMEOUT_S) -> Any:
        try:
            actor = self._actor or await asyncio.to_thread(self._find)
            return await asyncio.wait_for(getattr(actor, method).remote(*args), timeout_s)
        except (ray.exceptions.RayError, TimeoutError, ValueError) as error:
            self._actor = None
            raise BackendUnreachable(f"the actor {_NAME}: {error!r}") from error

    def _find(self) -> Any:
        options = {"name": _NAME, "namespace": _NAMESPACE, "lifetime": "detached", "get_if_exists": True}
        actor_class: Any = _LedgerActor  # ray.remote has replaced the class
        self._actor = actor_class.options(**options).remote(self._lease_s)
        return self._actor
