"""Where all replicas of a server count the requests and tokens of callers."""

from __future__ import annotations

from serve.callers.ledger import RateLimitBackend
from serve.callers.ledger_ray import ActorLedger
from serve.callers.ledger_redis import RedisLedger
from serve.settings import ServeSettings


async def rate_limit_backend_of(settings: ServeSettings) -> RateLimitBackend:
    """The place where all replicas count the requests and tokens of callers: Redis if the settings name one, else an
    actor of Ray."""
    gateway = settings.gateway
    if gateway.limits_url:
        return RedisLedger(gateway.limits_url, gateway.lease_s)
    ledger = ActorLedger(gateway.lease_s)
    if gateway.knows_callers:
        await ledger.prepare()
    return ledger
