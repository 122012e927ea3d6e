"""Enforces for each request of an authenticated caller the limits of body and output and the caller's rate limits,
holds the engine queue, and counts the tokens that the request uses."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any, NamedTuple

from starlette.types import Receive, Scope

from serve.callers.identity import key_of
from serve.callers.ledger import LocalLedger, RateLimitBackend
from serve.callers.prompt_estimate import PromptEstimator, text_bytes
from serve.callers.rate_limits import Admitted, Limiter, rate_limits_of, smallest_token_limit
from serve.callers.token_budget import NO_RESERVATION, TokenLimits, TokenReservation
from serve.callers.usage import Meter
from serve.engine.protocol import Engine
from serve.engine.token_counter import Tokens, count_tokens
from serve.errors import ServeError
from serve.gateway.body import BodyBudget, LimitedReceive, announced_length
from serve.gateway.engine_queue import EngineQueue, QueueLimits
from serve.gateway.slow_clients import SlowClientGuard
from serve.observability.memory import memory_limit_bytes
from serve.observability.open_requests import OpenRequests
from serve.settings import GatewaySettings

# The rest is for what is made of a body, a multiple of its bytes: its fields, the prompt, the tokens.
_BODIES_SHARE_OF_MEMORY = 1 / 16


class _Prompt(NamedTuple):
    """What the size of a prompt is estimated from."""

    caller: str
    path: str
    size_bytes: int


class AdmittedRequest:
    """One request that the policy lets pass."""

    def __init__(self, added_fields: Mapping[str, Any], admission: Admitted, used: Tokens) -> None:
        """`added_fields`: to add to the body, such as a limit of the output; `used` counts the request's tokens."""
        self.added_fields = added_fields
        self.limit_headers = [(name.encode(), value.encode()) for name, value in admission.headers.items()]
        self.is_refused = False
        self._admission = admission
        self.used = used

    async def settle(self) -> None:
        """Replaces the tokens that were reserved by those that were used. Only the first call counts."""
        await self._admission.settle(self.used.total)

    async def refuse(self) -> None:
        """The caller gets an error that asks it to try again: the request counts neither against its limits nor as
        usage."""
        self.is_refused = True
        await self._admission.withdraw()


class RequestPolicy:
    """The policy of one replica."""

    def __init__(
        self,
        settings: GatewaySettings,
        engine: Engine,
        rate_limits: RateLimitBackend | None = None,
        meter: Meter | None = None,
        open_requests: OpenRequests | None = None,
    ) -> None:
        """`rate_limits`: shared by all replicas, by default this replica's own; `meter`: records usage, if given."""
        self._settings = settings
        self.max_wait_s, self.max_run_s = settings.max_wait_s, settings.max_run_s
        self._engine = engine
        self._prompts = PromptEstimator(engine.prompt_size)
        self.meter = meter
        self.open_requests = open_requests or OpenRequests()
        self.limiter = Limiter(
            rate_limits or LocalLedger(settings.lease_s),
            settings.lease_s,
            refuses_when_unavailable=settings.limits_when_unavailable == "refuse",
        )
        self.engine_queue = EngineQueue(
            settings.max_running_requests or engine.max_running_requests,
            QueueLimits(settings.max_waiting_requests, settings.max_waiting_per_caller, settings.max_wait_s),
        )
        self.slow_clients = SlowClientGuard(settings.send_timeout_s)
        self.bodies = BodyBudget(body_memory_bytes(settings))

    @contextmanager
    def limited(self, scope: Scope, receive: Receive) -> Iterator[LimitedReceive]:
        """The `receive` of a request within the limits of its body. The memory of the body counts as held until the
        context ends."""
        with self.open_requests.counted(), self.bodies.charge() as charge:
            max_bytes, timeout_s = self._settings.max_body_bytes, self._settings.body_timeout_s
            yield LimitedReceive(receive, announced_length(scope), charge, max_bytes, timeout_s)

    @asynccontextmanager
    async def enforce(self, scope: Scope, model: str, fields: dict[str, Any]) -> AsyncIterator[AdmittedRequest]:
        """Admits a request for `model`, which its caller may use, for as long as the context lasts. A request that is
        refused inside, by a ServeError, counts neither against the caller's limits nor as usage. Raises RateLimited,
        LimitsUnavailable, OutputTooLong or InvalidBody."""
        key = key_of(scope)
        rate_limits = rate_limits_of(key, model)
        budget, max_output = smallest_token_limit(rate_limits), self._settings.max_output_tokens
        prompt = _Prompt(key.id if key else "", scope["path"], text_bytes(fields)) if budget is not None else None
        reservation = NO_RESERVATION
        if budget is not None or max_output is not None:
            token_limits = TokenLimits(self._engine.context_tokens, max_output, budget)
            prompt_tokens = self._prompts.estimate(*prompt) if prompt else 0
            reservation = TokenReservation.for_request(scope["path"], fields, prompt_tokens, token_limits)
        with count_tokens() as used:
            # Without a limit of tokens none are reserved: `n` may make their number as large as a body can write it.
            reserved = reservation.tokens if prompt else 0
            async with self.limiter.admit(rate_limits, reserved, used) as admission:
                request = AdmittedRequest(reservation.added, admission, used)
                try:
                    yield request
                except ServeError:
                    request.is_refused = True
                    raise
                finally:
                    if prompt and used.prompt:
                        self._prompts.observe(*prompt, used.prompt)
                    if self.meter and not request.is_refused:
                        self.meter.add(key.id if key else None, model, used)


def body_memory_bytes(settings: GatewaySettings) -> int:
    """The memory for bodies: what the settings say, else a share of the memory that there is."""
    share = int(memory_limit_bytes() * _BODIES_SHARE_OF_MEMORY)
    return settings.body_memory_bytes or max(settings.least_body_memory_bytes, share)
