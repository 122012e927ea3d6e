"""The written files, read back and compared with the reference."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.artifact import Quality
from convert.errors import QualityGateFailed
from convert.progress import Progress
from convert.quality.canaries import Answer, ask, passed
from convert.quality.forward import log_probs, picked, run
from convert.quality.gain import gain_kept, perplexity
from convert.quality.model import load_written
from convert.quality.reference import Reference
from convert.quality.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Examination:
    """What was found: the figures, the answers to the canaries, and for each row of `rows.all` the log-probability
    of every token but the first."""

    quality: Quality
    answers: tuple[Answer, ...]
    own: tuple[torch.Tensor, ...]


def examine(expected: Reference, model: Path, adapter: Path | None, progress: Progress) -> Examination:
    """Run the written model, with its written adapter if it has one, over what the reference ran over.

    Raises QualityGateFailed where its probabilities are not numbers.
    """
    import torch

    result = load_written(model, adapter)
    divergence, agreement, own = [], [], []
    with torch.inference_mode():
        for number, (row, states) in enumerate(run(result, expected.rows.all, "result", progress)):
            found = list(log_probs(result, states))
            if number < len(expected.rows.measured):
                differences = _differences(expected.kept.log_probs(number), found)
                divergence.append(differences[0])
                agreement.append(differences[1])
            own.append(picked(found, row))
        answers = ask(result, Tokenizer.open(model), expected.canaries, "result", progress)
    quality = _quality(expected, torch.cat(divergence), torch.cat(agreement), own)
    return Examination(quality.model_copy(update={"canaries": passed(answers)}), answers, tuple(own))


def measure(expected: Reference, model: Path, adapter: Path | None, progress: Progress) -> Quality:
    """The figures alone."""
    return examine(expected, model, adapter, progress).quality


def _differences(want: Iterable[torch.Tensor], got: Iterable[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """At each position: KL(want || got) = Σ p·(log p - log q) in nats, and whether the best token is the same."""
    import torch

    def each() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for one, other in zip(want, got, strict=True):
            # In float64: sums over a whole vocabulary of differences near float32's resolution.
            p, q = one.double(), other.double()
            yield (p.exp() * (p - q)).sum(-1).clamp_min(0), one.argmax(-1) == other.argmax(-1)

    divergence, agreement = zip(*each(), strict=True)
    return torch.cat(divergence), torch.cat(agreement)


def _quality(
    expected: Reference, divergence: torch.Tensor, agreement: torch.Tensor, own: list[torch.Tensor]
) -> Quality:
    reference, base, result = (expected.rows.pick_written(each) for each in (expected.own, expected.base, own))
    kl_mean = float(divergence.mean())
    if not math.isfinite(kl_mean):
        raise QualityGateFailed("The result's probabilities are not numbers: nothing was published.")
    figures: dict[str, Any] = {
        "kl_mean": kl_mean,
        "kl_p99": float(divergence.quantile(0.99)),
        "top1_agreement": float(agreement.double().mean()),
        "perplexity": perplexity(result),
        "perplexity_reference": perplexity(reference),
        "perplexity_base": perplexity(base),
        "gain_kept": gain_kept(reference, base, result),
    }
    return Quality(reference=expected.description, text=expected.text.name, tokens=divergence.numel(), **figures)
