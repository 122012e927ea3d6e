"""Whether a resident adapter still is itself: it is asked, now and then, what it said when it was loaded.

An engine that mixed two adapters up, or answered with the base alone, would do it without an error. One short prompt
tells: log-probabilities of other weights are far away, those of the same ones differ by rounding only.
"""

from __future__ import annotations

from collections.abc import Sequence

from serve.engine import Engine
from serve.events import Events
from serve.names import AdapterRevision
from serve.residency import AdapterPool

_PROMPT_TOKENS = 24
_POSITIONS = (5, 11, 17, 23)  # a request of one token for each
_STRIDE = 7919  # a prime: tokens from all over the vocabulary


class Sentinel:
    """One replica's; each call of `look` asks one of the adapters that have a slot, which is where two could be mixed
    up: the one that was not asked for longest."""

    def __init__(self, engine: Engine, pool: AdapterPool, tolerance_nats: float, events: Events) -> None:
        self._engine = engine
        self._pool = pool
        self._tolerance_nats = tolerance_nats
        self._events = events
        self._said: dict[AdapterRevision, tuple[float, ...]] = {}  # what was asked last is last

    async def look(self) -> None:
        """Ask one adapter, if one can be asked without making anyone wait."""
        resident, slots = self._pool.resident, self._pool.turns.holding
        self._said = {adapter: said for adapter, said in self._said.items() if adapter in resident}
        order = [*sorted((resident & slots) - self._said.keys()), *(it for it in self._said if it in slots)]
        adapter = next((it for it in order if self._pool.is_at_hand(it)), None)
        if adapter is None:
            return
        async with self._pool.use(adapter, "sentinel"):
            says = await self._engine.logprobs(adapter, self._prompt(), _POSITIONS)
        said = self._said.pop(adapter, None)
        if said is not None:
            distance = _distance(said, says)
            # The first answer stays the one to be compared with: small steps must not add up to another adapter.
            self._events.identity_checked(adapter, distance, distance <= self._tolerance_nats)
        self._said[adapter] = said or says

    def _prompt(self) -> list[int]:
        return [(29 + _STRIDE * number) % self._engine.vocabulary_size for number in range(_PROMPT_TOKENS)]


def _distance(ones: Sequence[float], others: Sequence[float]) -> float:
    return sum(abs(one - other) for one, other in zip(ones, others, strict=True)) / len(ones)
