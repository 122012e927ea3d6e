"""Checks that a resident adapter still answers as it did when it was loaded.

An engine that mixed up two adapters, or answered with the base model alone, would report no error. One short prompt
shows it: log-probabilities of other weights are far away, those of the same weights differ by rounding only.
"""

from __future__ import annotations

from collections.abc import Sequence

from serve.adapters.pool import AdapterPool
from serve.engine.protocol import Engine
from serve.names import AdapterRevision
from serve.observability.events import Events

_PROMPT_TOKENS = 24
_POSITIONS = (5, 11, 17, 23)  # a request of one token for each
_STRIDE = 7919  # a prime: tokens from all over the vocabulary


class IdentityChecker:
    """Checks the adapters of one replica, one with each call: of the adapters that have a slot, the one whose last
    check is longest ago. Only adapters with a slot can be mixed up."""

    def __init__(self, engine: Engine, pool: AdapterPool, tolerance_nats: float, events: Events) -> None:
        self._engine = engine
        self._pool = pool
        self._tolerance_nats = tolerance_nats
        self._events = events
        # The first answer of each adapter: nats at _POSITIONS. The adapter that was checked last is the last one.
        self._first_answers: dict[AdapterRevision, tuple[float, ...]] = {}

    async def check(self) -> None:
        """Checks one adapter if that makes no request wait, and reports the result as an event."""
        adapter = self._next_adapter()
        if adapter is None:
            return
        async with self._pool.use(adapter, "identity_checker"):
            answer = await self._engine.logprobs(adapter, self._prompt(), _POSITIONS)
        first_answer = self._first_answers.pop(adapter, None)
        if first_answer is not None:
            distance_nats = _mean_distance(first_answer, answer)
            self._events.identity_checked(adapter, distance_nats, distance_nats <= self._tolerance_nats)
        # The first answer stays the reference: many small steps must not add up to another adapter.
        self._first_answers[adapter] = first_answer or answer

    def _next_adapter(self) -> AdapterRevision | None:
        resident, with_slot = self._pool.resident, self._pool.slots.holding
        self._first_answers = {
            adapter: answer for adapter, answer in self._first_answers.items() if adapter in resident
        }
        never_checked = sorted((resident & with_slot) - self._first_answers.keys())
        checked_before = [adapter for adapter in self._first_answers if adapter in with_slot]
        candidates = (*never_checked, *checked_before)
        return next((adapter for adapter in candidates if self._pool.can_run_at_once(adapter)), None)

    def _prompt(self) -> list[int]:
        return [(29 + _STRIDE * number) % self._engine.vocabulary_size for number in range(_PROMPT_TOKENS)]


def _mean_distance(first: Sequence[float], second: Sequence[float]) -> float:
    return sum(abs(before - now) for before, now in zip(first, second, strict=True)) / len(first)
