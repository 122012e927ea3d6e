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


class Prover:
    """The proofs of one replica; a handful of short prompts each."""

    def __init__(self, engine: Engine, store: AdapterStore, settings: AdmissionSettings) -> None:
        self._engine = engine
        self._store = store
        self._settings = settings

    async def prove(self, candidate: Candidate) -> None:
        """Raises AdapterRejected if the resident adapter fails, AdapterUnavailable if its golden answers are gone."""
        if self._settings.least_change_nats:
            await self._changes_the_base(candidate.adapter)
        if candidate.golden:
            content = await asyncio.to_thread(self._store.golden, candidate.golden)
            await self._keeps_its_word(candidate.adapter, _golden(content))

    async def _changes_the_base(self, adapter: AdapterRevision) -> None:
        tokens = [(17 + _STRIDE * number) % self._engine.vocabulary_size for number in range(_PROBE_TOKENS)]
        base, changed = await self._engine.logprobs(None, tokens), await self._engine.logprobs(adapter, tokens)
        most = max(abs(one - other) for one, other in zip(base, changed, strict=True))
        if not most > self._settings.least_change_nats:
            raise AdapterRejected(
                f"{adapter} was loaded but changes nothing: log-probabilities of a probe differ by {most:.2g} nats at "
                f"most ({self._settings.least_change_nats:g} expected; least_change_nats). Its weights match no "
                "module, or it is untrained."
            )

    async def _keeps_its_word(self, adapter: AdapterRevision, golden: Golden) -> None:
        fitting = [it for it in golden.prompts if len(it.token_ids) <= self._engine.context_tokens]
        for number, prompt in enumerate(fitting[:_MOST_PROMPTS], 1):
            here = await self._engine.logprobs(adapter, prompt.token_ids)
            distance = _distance(here, prompt.result)
            if not distance <= self._settings.golden_tolerance_nats:
                raise AdapterRejected(
                    f"{adapter} answers otherwise here than when it was converted: on golden prompt {number} its "
                    f"log-probabilities are {distance:.2g} nats away in the mean "
                    f"({self._settings.golden_tolerance_nats:g} allowed; golden_tolerance_nats)"
                    f"{_of_the_base(here, prompt)}."
                )


def _of_the_base(here: Sequence[float], prompt: GoldenPrompt) -> str:
    return f", and {_distance(here, prompt.base):.2g} from the base model's" if prompt.base else ""


def _distance(ones: Sequence[float], others: Sequence[float]) -> float:
    return sum(abs(one - other) for one, other in zip(ones, others, strict=True)) / len(ones)


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
