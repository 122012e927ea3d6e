"""The ledger of `serve.callers.ledger` in Redis (or Valkey), which several Ray clusters can share.

One script decides a reservation atomically, by the clock of the Redis server, so that replicas whose clocks differ
agree. An account has three keys, which share a hash slot: a sorted set of its entries by time, a hash with the tokens
of each entry and their sum, and a sorted set of its leases by their end. Times are milliseconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from serve.callers.ledger import (
    WINDOW_S,
    BackendUnreachable,
    Decision,
    RateLimit,
    Refusal,
    Reservation,
    WindowUsage,
)

# A call that times out is repeated once, on a new connection: the server may have paused for a moment.
_TIMEOUT_S = 2.0
_RETRIES = 1
_WINDOW_MS = int(WINDOW_S * 1000)

# All scripts begin with this. KEYS: three for each account. ARGV[1]: the request, an object in JSON.
_ACCOUNTS = """
local request = cjson.decode(ARGV[1])
local accounts = {}
for i = 1, #KEYS, 3 do
  table.insert(accounts, {entries = KEYS[i], tokens = KEYS[i + 1], leases = KEYS[i + 2]})
end
"""

# The time is the request's now_ms, or that of the server's clock if it is 0.
_NOW = """
local now = request.now_ms
if now == 0 then
  local clock = redis.call('TIME')
  now = clock[1] * 1000 + math.floor(clock[2] / 1000)
end
"""

# The request has now_ms, id, tokens, window_ms, lease_ms, and for each account `limits`: requests, tokens, concurrent,
# of which those without a limit are absent. The response, in JSON, has for each account `usage`: requests, tokens,
# reset_ms; and if the request is refused, `refusal`: limit (from 1), kind, retry_after_ms (absent: unknown or never),
# running_tokens (absent: 0).
_RESERVE = (
    _ACCOUNTS
    + _NOW
    + """
local function tokens_of(account, id)
  return tonumber(redis.call('HGET', account.tokens, id) or 0)
end

local function drop_expired(account)
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', account.entries, '-inf', now - request.window_ms)) do
    local tokens = tokens_of(account, id)
    -- Redis 7.0 writes minus zero as "-0", which HINCRBY refuses.
    if tokens ~= 0 then redis.call('HINCRBY', account.tokens, 'sum', -tokens) end
    redis.call('HDEL', account.tokens, id)
    redis.call('ZREM', account.entries, id)
  end
  redis.call('ZREMRANGEBYSCORE', account.leases, '-inf', now)
end

local function leaves_after(account, id)
  return tonumber(redis.call('ZSCORE', account.entries, id)) + request.window_ms - now
end

-- Running requests give back what they don't use, each at its end, which nobody knows. So those that have ended count.
local function refusal_of_tokens(account, usage, limit)
  local ended, running = {}, 0
  for _, id in ipairs(redis.call('ZRANGE', account.entries, 0, -1)) do
    if redis.call('ZSCORE', account.leases, id) then running = running + tokens_of(account, id)
    else table.insert(ended, id) end
  end
  local over, retry_after_ms = usage.tokens - running + request.tokens - limit.tokens, 0
  for _, id in ipairs(ended) do
    if over <= 0 then break end
    over = over - tokens_of(account, id)
    retry_after_ms = leaves_after(account, id)
  end
  return {kind = 'tokens', retry_after_ms = retry_after_ms, running_tokens = running}
end

local function refusal_of(account, usage, limit)
  if limit.requests and usage.requests >= limit.requests then
    local over = usage.requests - limit.requests
    local last = redis.call('ZRANGE', account.entries, over, over)[1]
    return {kind = 'requests', retry_after_ms = leaves_after(account, last)}
  end
  if limit.tokens and usage.tokens + request.tokens > limit.tokens then
    if request.tokens > limit.tokens then return {kind = 'tokens'} end
    return refusal_of_tokens(account, usage, limit)
  end
  if limit.concurrent and redis.call('ZCARD', account.leases) >= limit.concurrent then
    return {kind = 'concurrent'}
  end
end

local function enter(account)
  redis.call('ZADD', account.entries, now, request.id)
  redis.call('HSET', account.tokens, request.id, request.tokens)
  redis.call('HINCRBY', account.tokens, 'sum', request.tokens)
  redis.call('ZADD', account.leases, now + request.lease_ms, request.id)
  redis.call('PEXPIRE', account.entries, request.window_ms + 1000)
  redis.call('PEXPIRE', account.tokens, request.window_ms + 1000)
  redis.call('PEXPIRE', account.leases, request.lease_ms + 1000)
end

local function reset_after(account)
  local newest = redis.call('ZRANGE', account.entries, -1, -1, 'WITHSCORES')
  return newest[2] and tonumber(newest[2]) + request.window_ms - now or 0
end

-- The response to an earlier try may have been lost: a request that is entered already is not entered twice.
local is_entered = redis.call('HEXISTS', accounts[1].tokens, request.id) == 1
local response = {usage = {}}
for i, account in ipairs(accounts) do
  drop_expired(account)
  local usage = {requests = redis.call('ZCARD', account.entries), tokens = tokens_of(account, 'sum')}
  response.usage[i] = usage
  if not is_entered and not response.refusal then
    response.refusal = refusal_of(account, usage, request.limits[i])
    if response.refusal then response.refusal.limit = i end
  end
end
for i, account in ipairs(accounts) do
  local usage = response.usage[i]
  if not is_entered and not response.refusal then
    enter(account)
    usage.requests = usage.requests + 1
    usage.tokens = usage.tokens + request.tokens
  end
  usage.reset_ms = reset_after(account)
end
return cjson.encode(response)
"""
)

# The request has id and tokens (absent: unknown).
_SETTLE = (
    _ACCOUNTS
    + """
for _, account in ipairs(accounts) do
  redis.call('ZREM', account.leases, request.id)
  local reserved = redis.call('HGET', account.tokens, request.id)
  if request.tokens and reserved then
    redis.call('HSET', account.tokens, request.id, request.tokens)
    redis.call('HINCRBY', account.tokens, 'sum', request.tokens - tonumber(reserved))
  end
end
"""
)

# The request has id.
_WITHDRAW = (
    _ACCOUNTS
    + """
for _, account in ipairs(accounts) do
  redis.call('ZREM', account.leases, request.id)
  redis.call('ZREM', account.entries, request.id)
  local reserved = tonumber(redis.call('HGET', account.tokens, request.id) or 0)
  if reserved ~= 0 then redis.call('HINCRBY', account.tokens, 'sum', -reserved) end
  redis.call('HDEL', account.tokens, request.id)
end
"""
)

# The request has now_ms, id, lease_ms.
_RENEW = (
    _ACCOUNTS
    + _NOW
    + """
for _, account in ipairs(accounts) do
  local ends = redis.call('ZSCORE', account.leases, request.id)
  if ends and tonumber(ends) > now then
    redis.call('ZADD', account.leases, now + request.lease_ms, request.id)
    redis.call('PEXPIRE', account.leases, request.lease_ms + 1000)
  end
end
"""
)


class RedisLedger:
    """`serve.callers.ledger.RateLimitBackend` in one Redis database."""

    def __init__(self, url: str, lease_s: float) -> None:
        """`url`: redis://, rediss:// or unix://, as redis-py reads it. Does not connect yet."""
        from redis.asyncio import Redis
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff

        self._redis: Any = Redis.from_url(
            url,
            socket_timeout=_TIMEOUT_S,
            socket_connect_timeout=_TIMEOUT_S,
            retry=Retry(NoBackoff(), _RETRIES),
        )
        self._lease_ms = int(lease_s * 1000)
        self._reserve: Any = self._redis.register_script(_RESERVE)
        self._settle: Any = self._redis.register_script(_SETTLE)
        self._withdraw: Any = self._redis.register_script(_WITHDRAW)
        self._renew: Any = self._redis.register_script(_RENEW)

    async def reserve(self, reservation: Reservation, now_s: float = 0) -> Decision:
        """`now_s` replaces the clock of the server, for tests."""
        request = {
            "now_ms": int(now_s * 1000),
            "id": reservation.id,
            "tokens": reservation.tokens,
            "window_ms": _WINDOW_MS,
            "lease_ms": self._lease_ms,
            "limits": [_limit_fields(limit) for limit in reservation.limits],
        }
        return _decision(json.loads(await _run(self._reserve, reservation, request)))

    async def settle(self, reservation: Reservation, tokens: int | None) -> None:
        request = {"id": reservation.id} if tokens is None else {"id": reservation.id, "tokens": tokens}
        await _run(self._settle, reservation, request)

    async def withdraw(self, reservation: Reservation) -> None:
        await _run(self._withdraw, reservation, {"id": reservation.id})

    async def renew(self, reservations: Iterable[Reservation], now_s: float = 0) -> None:
        """`now_s` replaces the clock of the server, for tests."""
        for reservation in reservations:
            request = {"now_ms": int(now_s * 1000), "id": reservation.id, "lease_ms": self._lease_ms}
            await _run(self._renew, reservation, request)

    async def close(self) -> None:
        await self._redis.aclose()


async def _run(script: Any, reservation: Reservation, request: dict[str, Any]) -> Any:
    """Run a script on the accounts of a reservation."""
    from redis.exceptions import RedisError

    try:
        return await script(keys=_keys(reservation.accounts), args=[json.dumps(request)])
    except (RedisError, OSError) as error:
        raise BackendUnreachable(f"Redis: {type(error).__name__}: {error}") from error


def _keys(accounts: Iterable[str]) -> list[str]:
    """Three Redis keys for each account, which is `KEY` or `KEY/MODEL`. The braces put all accounts of one API key into
    one slot of a Redis cluster."""
    names = [(account, account.partition("/")[0]) for account in accounts]
    return [f"graft:{{{key}}}:{account}:{part}" for account, key in names for part in ("entries", "tokens", "leases")]


def _limit_fields(limit: RateLimit) -> dict[str, int]:
    fields = {"requests": limit.requests, "tokens": limit.tokens, "concurrent": limit.concurrent}
    return {name: value for name, value in fields.items() if value is not None}


def _decision(response: dict[str, Any]) -> Decision:
    usage = tuple(WindowUsage(each["requests"], each["tokens"], each["reset_ms"] / 1000) for each in response["usage"])
    refusal = response.get("refusal")
    if refusal is None:
        return Decision(None, usage)
    retry_after_ms = refusal.get("retry_after_ms")
    retry_after_s = None if retry_after_ms is None else retry_after_ms / 1000
    running_tokens = refusal.get("running_tokens", 0)
    return Decision(Refusal(refusal["limit"] - 1, refusal["kind"], retry_after_s, running_tokens), usage)
