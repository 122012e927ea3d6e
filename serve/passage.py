"""What stands between a caller that is known and the engine: its limits, its place, and the count of what it uses."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from starlette.types import Message, Scope, Send

from serve.caller import key_of
from serve.config import GatewaySettings
from serve.demand import NO_DEMAND, demand_of
from serve.engine import Engine
from serve.ledger import Ledgers, LocalLedger
from serve.limits import Admitted, Limiter, bounds_of, smallest_token_limit
from serve.places import PlaceLimits, Places
from serve.readers import Readers
from serve.tokens import Tokens, counting
from serve.usage import Meter


@dataclass(frozen=True)
class Passage:
    """One request on its way. `added`: fields that its body needs."""

    added: dict[str, Any]
    _admitted: Admitted
    _used: Tokens

    def telling(self, send: Send, leave: Callable[[], None]) -> Send:
        """`send` with the headers that tell of the caller's limits. What was used is settled, and the place in the
        engine left, before the last byte leaves: the caller's next request, which may come at once, finds both."""
        headers = [(name.encode(), value.encode()) for name, value in self._admitted.headers.items()]

        def told(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                return send({**message, "headers": [*message.get("headers", ()), *headers]})
            return send(message) if message.get("more_body") else last(message)

        async def last(message: Message) -> None:
            leave()
            await self._admitted.settle(self._used.total)
            await send(message)

        return told


class Passages:
    """One replica's."""

    def __init__(
        self, settings: GatewaySettings, engine: Engine, ledgers: Ledgers | None = None, meter: Meter | None = None
    ) -> None:
        """`ledgers`: shared by all replicas; default: this replica's own. `meter`: who writes usage down, if anyone."""
        self._settings = settings
        self._engine = engine
        self.meter = meter
        self.limiter = Limiter(
            ledgers or LocalLedger(settings.lease_s),
            settings.lease_s,
            refuses_when_unavailable=settings.limits_when_unavailable == "refuse",
        )
        self.places = Places(
            settings.max_running_requests or engine.max_running_requests,
            PlaceLimits(settings.max_waiting_requests, settings.max_waiting_per_caller, settings.max_wait_s),
        )
        self.readers = Readers(settings.send_timeout_s)

    @asynccontextmanager
    async def open(self, scope: Scope, model: str, fields: dict[str, Any], size_bytes: int) -> AsyncIterator[Passage]:
        """For a request of `model` whose caller may use it. Raises RateLimited, LimitsUnavailable, OutputTooLong or
        InvalidBody."""
        key = key_of(scope)
        bounds = bounds_of(key, model)
        budget, max_output = smallest_token_limit(bounds), self._settings.max_output_tokens
        demand = NO_DEMAND
        if budget is not None or max_output is not None:
            demand = demand_of(scope["path"], fields, size_bytes, self._engine.context_tokens, max_output, budget)
        with counting() as used:
            async with self.limiter.within(bounds, demand.tokens, used) as admitted:
                try:
                    yield Passage(demand.added, admitted, used)
                finally:
                    if self.meter:
                        self.meter.add(key.id if key else None, model, used)
