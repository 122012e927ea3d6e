"""The shares of the fine-tune's gain, and of its distance from the base, that a result keeps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Nats per token. Where a fine-tune lowers the loss by less, there is nothing to keep or to lose.
LEAST_GAIN = 0.01
# Nats per token. Below it the mean KL between two models is mostly the rounding of float32.
LEAST_DISTANCE = 1e-6
# Standard errors by which a gain must differ from zero.
_SIGNIFICANT = 2.0


def gain_kept(
    reference: Sequence[torch.Tensor], base: Sequence[torch.Tensor], result: Sequence[torch.Tensor]
) -> float | None:
    """(loss_base - loss_result) / (loss_base - loss_reference), not below 0; above 1 where the result predicts better.

    Each argument has a tensor for each row: the log-probabilities of the row's own tokens. Losses are means over all
    tokens, in nats. None where the denominator, the fine-tune's gain, is below LEAST_GAIN or within two standard errors
    of zero, and without rows.
    """
    if not reference:
        return None
    gained = _subtract(reference, base)
    gain, error = mean_and_error(gained)
    if gain < max(LEAST_GAIN, _SIGNIFICANT * error):
        return None
    kept, _ = mean_and_error(_subtract(result, base))
    return max(0.0, kept / gain)


def distance_kept(kl_base: float, kl_result: float) -> float | None:
    """1 - KL(reference || result) / KL(reference || base), not below 0; both are means in nats per token.

    On text that the reference wrote itself it is what `gain_kept` is in expectation, and it needs no such text. None
    where KL(reference || base) is below LEAST_DISTANCE: then the text doesn't show what the fine-tune changed.
    """
    if kl_base < LEAST_DISTANCE:
        return None
    return max(0.0, 1 - kl_result / kl_base)


def mean_and_error(rows: Sequence[torch.Tensor]) -> tuple[float, float]:
    """Mean over all tokens, and its standard error with rows as clusters; 0 for the error of a single row.

    Tokens of one row depend on each other, so the error is that of row sums: with N tokens in G rows and residuals e,
    sqrt(G/(G-1) · Σ_rows (Σ_tokens e)²) / N (Miller, "Adding Error Bars to Evals", https://arxiv.org/abs/2411.00640,
    section 2.2, with the usual correction for few clusters).
    """
    count = sum(row.numel() for row in rows)
    mean = sum(float(row.double().sum()) for row in rows) / count
    if len(rows) < 2:
        return mean, 0.0
    squares = sum(float((row.double() - mean).sum()) ** 2 for row in rows)
    return mean, math.sqrt(len(rows) / (len(rows) - 1) * squares) / count


def perplexity(rows: Sequence[torch.Tensor]) -> float | None:
    """exp of the mean loss in nats per token, as transformers' guide defines it; at most the largest float.

    None without rows. Source: https://huggingface.co/docs/transformers/perplexity
    """
    if not rows:
        return None
    mean, _ = mean_and_error(rows)
    return math.exp(min(-mean, 700.0))


def _subtract(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [left_row - right_row for left_row, right_row in zip(left, right, strict=True)]
