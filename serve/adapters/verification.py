"""Verifies a new revision on the real engine: it must change the answers of the base model, and give the answers that
were recorded when it was converted. A load that succeeds shows neither."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from pydantic import ValidationError

from convert.artifact import Golden, GoldenPrompt, problems_of
from serve.catalogue.adapter_store import AdapterStore
from serve.catalogue.candidate import Candidate
from serve.engine.protocol import Engine
from serve.errors import AdapterRejected
from serve.names import AdapterRevision
from serve.settings import AdmissionSettings

_PROBE_TOKENS = 32
_STRIDE = 7919  # a prime: tokens from all over the vocabulary
_MAX_PROMPTS = 8
# For every position the engine computes the prompt again, while requests of users wait.
_PROBE_POSITIONS = 4
_GOLDEN_POSITIONS = 2

_Logprobs = Sequence[float]  # in nats


class RevisionVerifier:
    """Verifies revisions on the engine of one replica, each with a few short prompts."""

    def __init__(self, engine: Engine, store: AdapterStore, settings: AdmissionSettings) -> None:
        self._engine = engine
        self._store = store
        self._settings = settings
        self._base_probe: tuple[float, ...] | None = None

    async def verify(self, candidate: Candidate) -> None:
        """Raises AdapterRejected if the resident adapter fails, AdapterUnavailable if its golden answers are gone."""
        if self._settings.least_change_nats:
            await self._check_changes_base(candidate.adapter)
        if candidate.golden:
            content = await asyncio.to_thread(self._store.golden, candidate.golden)
            await self._check_golden_answers(candidate.adapter, _parse_golden(content))

    async def _check_changes_base(self, adapter: AdapterRevision) -> None:
        if self._base_probe is None:
            self._base_probe = await self._probe(None)
        probe = await self._probe(adapter)
        largest = max(abs(base - changed) for base, changed in zip(self._base_probe, probe, strict=True))
        # `not >` instead of `<=`, so that NaN is rejected.
        if not largest > self._settings.least_change_nats:
            raise AdapterRejected(
                f"{adapter} was loaded but changes nothing: log-probabilities of a probe differ by {largest:.2g} nats "
                f"at most ({self._settings.least_change_nats:g} expected; least_change_nats). Its weights match no "
                "module, or it is untrained."
            )

    async def _probe(self, adapter: AdapterRevision | None) -> tuple[float, ...]:
        """The log-probabilities of a fixed prompt, computed with an adapter or the base model."""
        tokens = [(17 + _STRIDE * number) % self._engine.vocabulary_size for number in range(_PROBE_TOKENS)]
        return await self._engine.logprobs(adapter, tokens, _positions(tokens, _PROBE_POSITIONS))

    async def _check_golden_answers(self, adapter: AdapterRevision, golden: Golden) -> None:
        fitting = [prompt for prompt in golden.prompts if len(prompt.token_ids) <= self._engine.context_tokens]
        prompts = fitting[:_MAX_PROMPTS]
        answers = [
            await self._engine.logprobs(adapter, prompt.token_ids, _positions(prompt.token_ids)) for prompt in prompts
        ]
        distance_nats = _mean_distance(prompts, answers, [prompt.result for prompt in prompts])
        # `not <=` instead of `>`, so that NaN is rejected.
        if not distance_nats <= self._settings.golden_tolerance_nats:
            raise AdapterRejected(
                f"{adapter} answers otherwise here than when it was converted: on its golden prompts its "
                f"log-probabilities are {distance_nats:.2g} nats away in the mean "
                f"({self._settings.golden_tolerance_nats:g} allowed; golden_tolerance_nats)"
                f"{_distance_from_base(prompts, answers)}."
            )


def _distance_from_base(prompts: Sequence[GoldenPrompt], answers: Sequence[_Logprobs]) -> str:
    """The part of the message that says whether the engine answers like the base model; empty if the golden answers
    lack those of the base model."""
    base = [prompt.base for prompt in prompts if prompt.base]
    if len(base) != len(answers):
        return ""
    return f", and {_mean_distance(prompts, answers, base):.2g} from the base model's"


def _positions(token_ids: Sequence[int], most: int = _GOLDEN_POSITIONS) -> tuple[int, ...]:
    """At most `most` of the positions that can be predicted: evenly spread, with the last one among them."""
    last = len(token_ids) - 1
    count = min(last, most)
    return tuple(last * number // count for number in range(1, count + 1))


def _mean_distance(
    prompts: Sequence[GoldenPrompt], answers: Sequence[_Logprobs], expected: Sequence[_Logprobs]
) -> float:
    """The mean distance in nats over all prompts; 0 if there is none. An answer has the positions of `_positions`,
    `expected` has all positions from 1 on."""
    distances = [
        abs(logprob - row[position - 1])
        for prompt, answer, row in zip(prompts, answers, expected, strict=True)
        for position, logprob in zip(_positions(prompt.token_ids), answer, strict=True)
    ]
    return sum(distances) / len(distances) if distances else 0.0


def _parse_golden(content: bytes) -> Golden:
    try:
        golden = Golden.model_validate_json(content)
    except ValidationError as error:
        raise AdapterRejected(f"Its golden.json does not follow the contract: {problems_of(error)}.") from error
    for prompt in golden.prompts:
        lengths = {len(logprobs) for logprobs in (prompt.result, prompt.base) if logprobs is not None}
        if lengths != {len(prompt.token_ids) - 1}:
            raise AdapterRejected("Its golden.json has another number of log-probabilities than of tokens to predict.")
    return golden
