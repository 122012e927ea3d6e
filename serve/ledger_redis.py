"""The books of `serve.ledger` in Redis (or Valkey), for several Ray clusters or a memory that outlives one.

One script does all of a claim at once, by the clock of the server, so that replicas with different clocks agree. An
account has three keys, which share a hash slot: a sorted set of requests by time, a hash of their tokens with the sum
of them, and a sorted set of leases by their end. Times are milliseconds.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

from serve.ledger import WINDOW_S, Bound, Claim, Kind, LedgerUnreachable, Refusal, Standing, Verdict

# A server that stood still for a moment is asked once more, on a new connection.
_TIMEOUT_S = 2.0
_RETRIES = 1
_WINDOW_MS = int(WINDOW_S * 1000)
_KINDS: tuple[Kind, ...] = ("requests", "tokens", "concurrent")

# ARGV of all scripts: now (or 0 for the server's clock), then their own.
_NOW = """
local now = tonumber(ARGV[1])
if now == 0 then
  local clock = redis.call('TIME')
  now = clock[1] * 1000 + math.floor(clock[2] / 1000)
end
"""

# KEYS: three for each account. ARGV: now, id, tokens, window, lease, then three limits for each account, -1 for none.
# What was reserved already, by a try whose answer was lost, is not reserved twice.
# Returns the refused bound (from 1; 0: none), the kind (from 0), milliseconds to wait (-1: unknown), and for each
# account: requests, tokens, milliseconds until the window is empty.
_RESERVE = (
    _NOW
    + """
local id, tokens, window, lease = ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local refused, kind, wait = 0, 0, -1
local again = redis.call('HEXISTS', KEYS[2], id) == 1
local counts = {}
local function free_after(entries, hash, requests, excess)
  for i, member in ipairs(redis.call('ZRANGE', entries, 0, -1)) do
    requests = requests - 1
    excess = excess - tonumber(redis.call('HGET', hash, member) or 0)
    if requests <= 0 and excess <= 0 then
      return tonumber(redis.call('ZSCORE', entries, member)) + window - now
    end
  end
  return window
end
for i = 1, #KEYS / 3 do
  local entries, hash, leases = KEYS[3 * i - 2], KEYS[3 * i - 1], KEYS[3 * i]
  for _, member in ipairs(redis.call('ZRANGEBYSCORE', entries, '-inf', now - window)) do
    local left = tonumber(redis.call('HGET', hash, member) or 0)
    -- Redis 7.0 writes -0 as that, and takes it for no number.
    if left ~= 0 then redis.call('HINCRBY', hash, 'sum', -left) end
    redis.call('HDEL', hash, member)
    redis.call('ZREM', entries, member)
  end
  redis.call('ZREMRANGEBYSCORE', leases, '-inf', now)
  local used, sum = redis.call('ZCARD', entries), tonumber(redis.call('HGET', hash, 'sum') or 0)
  counts[i] = {used, sum}
  local max_requests, max_tokens = tonumber(ARGV[3 * i + 3]), tonumber(ARGV[3 * i + 4])
  local max_running = tonumber(ARGV[3 * i + 5])
  if refused == 0 and not again then
    if max_requests >= 0 and used >= max_requests then
      refused, kind, wait = i, 0, free_after(entries, hash, used - max_requests + 1, 0)
    elseif max_tokens >= 0 and sum + tokens > max_tokens then
      refused, kind = i, 1
      if tokens <= max_tokens then wait = free_after(entries, hash, 0, sum + tokens - max_tokens) end
    elseif max_running >= 0 and redis.call('ZCARD', leases) >= max_running then
      refused, kind = i, 2
    end
  end
end
local answer = {refused, kind, wait}
for i = 1, #KEYS / 3 do
  local entries, hash, leases = KEYS[3 * i - 2], KEYS[3 * i - 1], KEYS[3 * i]
  if refused == 0 and not again then
    redis.call('ZADD', entries, now, id)
    redis.call('HSET', hash, id, tokens)
    redis.call('HINCRBY', hash, 'sum', tokens)
    redis.call('ZADD', leases, now + lease, id)
    redis.call('PEXPIRE', entries, window + 1000)
    redis.call('PEXPIRE', hash, window + 1000)
    redis.call('PEXPIRE', leases, lease + 1000)
    counts[i] = {counts[i][1] + 1, counts[i][2] + tokens}
  end
  local last = redis.call('ZRANGE', entries, -1, -1, 'WITHSCORES')
  local left = 0
  if last[2] then left = tonumber(last[2]) + window - now end
  table.insert(answer, counts[i][1])
  table.insert(answer, counts[i][2])
  table.insert(answer, left)
end
return answer
"""
)

# KEYS: three for each account. ARGV: now, id, tokens (-1: unknown).
_SETTLE = """
for i = 1, #KEYS / 3 do
  local hash = KEYS[3 * i - 1]
  redis.call('ZREM', KEYS[3 * i], ARGV[2])
  local before = redis.call('HGET', hash, ARGV[2])
  if tonumber(ARGV[3]) >= 0 and before then
    redis.call('HSET', hash, ARGV[2], ARGV[3])
    redis.call('HINCRBY', hash, 'sum', tonumber(ARGV[3]) - tonumber(before))
  end
end
"""

# KEYS: three for each account. ARGV: now, id, lease.
_RENEW = (
    _NOW
    + """
for i = 1, #KEYS / 3 do
  redis.call('ZADD', KEYS[3 * i], now + tonumber(ARGV[3]), ARGV[2])
  redis.call('PEXPIRE', KEYS[3 * i], tonumber(ARGV[3]) + 1000)
end
"""
)


class RedisLedger:
    """serve.ledger.Ledgers in one Redis database."""

    def __init__(self, url: str, lease_s: float) -> None:
        """`url`: redis://, rediss:// or unix://, as redis-py reads it. Nothing is sent yet."""
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
        self._renew: Any = self._redis.register_script(_RENEW)

    async def reserve(self, claim: Claim, now_s: float = 0) -> Verdict:
        """`now_s`: instead of the server's clock."""
        limits = [_number(limit) for bound in claim.bounds for limit in _limits(bound)]
        args = [int(now_s * 1000), claim.id, claim.tokens, _WINDOW_MS, self._lease_ms, *limits]
        async with _reaching():
            return _verdict(await self._reserve(keys=_keys(claim.accounts), args=args))

    async def settle(self, claim: Claim, tokens: int | None, now_s: float = 0) -> None:
        async with _reaching():
            await self._settle(keys=_keys(claim.accounts), args=[int(now_s * 1000), claim.id, _number(tokens)])

    async def renew(self, claims: Iterable[Claim], now_s: float = 0) -> None:
        async with _reaching():
            for claim in claims:
                await self._renew(keys=_keys(claim.accounts), args=[int(now_s * 1000), claim.id, self._lease_ms])

    async def close(self) -> None:
        await self._redis.aclose()


@asynccontextmanager
async def _reaching() -> AsyncIterator[None]:
    from redis.exceptions import RedisError

    try:
        yield
    except (RedisError, OSError) as error:
        raise LedgerUnreachable(f"Redis: {type(error).__name__}: {error}") from error


def _keys(accounts: Iterable[str]) -> list[str]:
    """An account is `KEY` or `KEY/MODEL`; the braces put all of one key into one slot of a Redis cluster."""
    names = [(account, account.partition("/")[0]) for account in accounts]
    return [f"graft:{{{key}}}:{account}:{part}" for account, key in names for part in ("entries", "tokens", "leases")]


def _limits(bound: Bound) -> tuple[int | None, int | None, int | None]:
    return bound.requests, bound.tokens, bound.concurrent


def _number(value: int | None) -> int:
    return -1 if value is None else value


def _verdict(answer: list[int]) -> Verdict:
    refused, kind, wait_ms, *rest = answer
    standings = tuple(Standing(rest[i], rest[i + 1], rest[i + 2] / 1000) for i in range(0, len(rest), 3))
    if not refused:
        return Verdict(None, standings)
    return Verdict(Refusal(refused - 1, _KINDS[kind], None if wait_ms < 0 else wait_ms / 1000), standings)
