"""The examination of a result: its written files, read back and compared with the reference."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.artifact import Quality
from convert.errors import QualityGateFailed
from convert.inputs.chat.tokenizer import Tokenizer
from convert.progress import Progress
from convert.quality.canaries import Answer, ask, count_passed
from convert.quality.gain import distance_kept, gain_kept, perplexity
from convert.quality.models.written_model import open_written
from convert.quality.reference import Reference
from convert.quality.reference_logits import ModelComparison

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Examination:
    """The figures, the answers to the canaries, and the log-probabilities of the text's own tokens.

    `token_log_probs`: for each row of `tokens.all` a tensor (tokens - 1) with that of every token but the first.
    """

    quality: Quality
    answers: tuple[Answer, ...]
    token_log_probs: tuple[torch.Tensor, ...]


def examine(expected: Reference, model: Path, adapter: Path | None, progress: Progress) -> Examination:
    """Run the written model, with its written adapter if it has one, over the text of the reference.

    Raises QualityGateFailed where its probabilities are not numbers.
    """
    import torch

    result = open_written(model, adapter)
    with torch.inference_mode():
        compared = expected.logits.compare(result, "result", progress)
        answers = ask(result, Tokenizer.open(model), expected.canaries, "result", progress)
    result.release()
    canaries = count_passed(answers, expected.answers)
    quality = _quality(expected, compared).model_copy(update={"canaries": canaries})
    return Examination(quality, answers, compared.token_log_probs)


def measure(expected: Reference, model: Path, adapter: Path | None, progress: Progress) -> Quality:
    """The figures of `examine` alone."""
    return examine(expected, model, adapter, progress).quality


def _quality(expected: Reference, compared: ModelComparison) -> Quality:
    select = expected.tokens.select_answers
    reference, base = select(expected.token_log_probs), select(expected.base_token_log_probs)
    result = select(compared.token_log_probs)
    kl_mean = float(compared.divergences.mean())
    if not math.isfinite(kl_mean):
        raise QualityGateFailed("The result's probabilities are not numbers: nothing was published.")
    figures: dict[str, Any] = {
        "kl_mean": kl_mean,
        "kl_p99": float(compared.divergences.quantile(0.99)),
        "top1_agreement": float(compared.agreements.double().mean()),
        "perplexity": perplexity(result),
        "perplexity_reference": perplexity(reference),
        "perplexity_base": perplexity(base),
        "gain_kept": gain_kept(reference, base, result),
        "kl_base": expected.kl_base,
        "distance_kept": distance_kept(expected.kl_base, kl_mean),
    }
    return Quality(
        reference=expected.description, text=expected.text.name, tokens=compared.divergences.numel(), **figures
    )
