"""Proof on the real engine that a new revision is what it should be: it changes what the base says, and it says what
it said when it was converted. A load that succeeds proves neither."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from pydantic import ValidationError

from convert.artifact import Golden, GoldenPrompt, problems_of
from serve.candidate import Candidate
from serve.config import AdmissionSettings
from serve.engine import Engine
from serve.errors import AdapterRejected
from serve.names import AdapterRevision
from serve.store import AdapterStore

_PROBE_TOKENS = 32
_STRIDE = 7919  # a prime: tokens from all over the vocabulary
_MOST_PROMPTS = 8
# The engine reads a prompt anew for every position, while users wait for it.
_PROBE_POSITIONS = 4
_GOLDEN_POSITIONS = 2


class Prover:
    """The proofs of one replica; a handful of short prompts each."""

    def __init__(self, engine: Engine, store: AdapterStore, settings: AdmissionSettings) -> None:
        self._engine = engine
        self._store = store
        self._settings = settings
        self._base: tuple[float, ...] | None = None  # what it says to the probe

    async def prove(self, candidate: Candidate) -> None:
        """Raises AdapterRejected if the resident adapter fails, AdapterUnavailable if its golden answers are gone."""
        if self._settings.least_change_nats:
            await self._changes_the_base(candidate.adapter)
        if candidate.golden:
            content = await asyncio.to_thread(self._store.golden, candidate.golden)
            await self._keeps_its_word(candidate.adapter, _golden(content))

    async def _changes_the_base(self, adapter: AdapterRevision) -> None:
        if self._base is None:
            self._base = await self._says_to_the_probe(None)
        changed = await self._says_to_the_probe(adapter)
        most = max(abs(one - other) for one, other in zip(self._base, changed, strict=True))
        if not most > self._settings.least_change_nats:
            raise AdapterRejected(
                f"{adapter} was loaded but changes nothing: log-probabilities of a probe differ by {most:.2g} nats at "
                f"most ({self._settings.least_change_nats:g} expected; least_change_nats). Its weights match no "
                "module, or it is untrained."
            )

    async def _says_to_the_probe(self, adapter: AdapterRevision | None) -> tuple[float, ...]:
        tokens = [(17 + _STRIDE * number) % self._engine.vocabulary_size for number in range(_PROBE_TOKENS)]
        return await self._engine.logprobs(adapter, tokens, _positions(tokens, _PROBE_POSITIONS))

    async def _keeps_its_word(self, adapter: AdapterRevision, golden: Golden) -> None:
        prompts = [it for it in golden.prompts if len(it.token_ids) <= self._engine.context_tokens][:_MOST_PROMPTS]
        here = [await self._engine.logprobs(adapter, it.token_ids, _positions(it.token_ids)) for it in prompts]
        distance = _distance(here, [it.result for it in prompts], prompts)
        if not distance <= self._settings.golden_tolerance_nats:
            base = [it.base for it in prompts if it.base]
            of_base = (
                f", and {_distance(here, base, prompts):.2g} from the base model's" if len(base) == len(here) else ""
            )
            raise AdapterRejected(
                f"{adapter} answers otherwise here than when it was converted: on its golden prompts its "
                f"log-probabilities are {distance:.2g} nats away in the mean "
                f"({self._settings.golden_tolerance_nats:g} allowed; golden_tolerance_nats){of_base}."
            )


def _positions(token_ids: Sequence[int], most: int = _GOLDEN_POSITIONS) -> tuple[int, ...]:
    """At most `most` of those that can be predicted, evenly spread, the last one among them."""
    last = len(token_ids) - 1
    count = min(last, most)
    return tuple(last * number // count for number in range(1, count + 1))


def _distance(
    here: Sequence[Sequence[float]], told: Sequence[Sequence[float]], prompts: Sequence[GoldenPrompt]
) -> float:
    """In the mean over all prompts and their positions; `told` has every position. 0 if there is none."""
    differences = [
        abs(value - row[position - 1])
        for values, row, prompt in zip(here, told, prompts, strict=True)
        for value, position in zip(values, _positions(prompt.token_ids), strict=True)
    ]
    return sum(differences) / len(differences) if differences else 0.0


def _golden(content: bytes) -> Golden:
    try:
        golden = Golden.model_validate_json(content)
    except ValidationError as error:
        raise AdapterRejected(f"Its golden.json does not follow the contract: {problems_of(error)}.") from error
    for prompt in golden.prompts:
        lengths = {len(it) for it in (prompt.result, prompt.base) if it is not None}
        if lengths != {len(prompt.token_ids) - 1}:
            raise AdapterRejected("Its golden.json has another number of log-probabilities than of tokens to predict.")
    return golden
