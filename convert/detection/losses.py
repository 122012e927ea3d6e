"""Measures on the user's text whether an adapter fits the 4-bit weights of its base better than others.

With W16 the original base, dq the 4-bit one, q = W16 - dq, D the adapter's delta, and all losses on the answers of the
user's rows (other tokens were not trained in most fine-tunes, and reward the better base), three things must hold for a
QLoRA. Student's t is that of the rows' differences.

1. dq + D has a smaller loss than W16 + D.
2. It still has where the same difference of the bases without D is subtracted: the text alone may prefer one base.
3. W16 with q in random signs, and D on it, has a larger loss than W16 + D: it is q that D fits, not any error of its
   size. This repeats with several signs.

Nothing here speaks for a LoRA. The original base is the better model to begin with, so a QLoRA of a short training has
the smaller loss on it too, and so has one that was not trained long enough to fit q.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from convert.inputs.adapter_checkpoint import Checkpoint
from convert.inputs.base_model import BaseModel, Linear
from convert.progress import Progress
from convert.quality import TokenizedText
from convert.quality.models.layer_weights import ReadWeight, weights_as_trained
from convert.quality.models.peft_reference import changed_weights, with_adapter
from convert.quality.models.streamed_model import GROUP_TOKENS, StreamedModel, Variant
from convert.quantization.nf4 import Nf4

if TYPE_CHECKING:
    import torch

MIN_T = 3.0
MIN_ROWS = 8
CONTROLS = 3


@dataclass(frozen=True)
class LossComparison:
    """Mean losses in nats per answer token of one adapter on two forms of its base, and Student's t of the paired rows.

    `t` > 0: the loss is smaller on the 4-bit weights. `t_beyond_base`: the same, less the difference of the bases
    alone. `controls`: t of each set of random signs against the full-precision weights, < 0 where its loss is larger;
    they are measured while the answer is still open. Each t is 0 where there are fewer than two rows.
    """

    full: float
    four_bit: float
    t: float
    t_beyond_base: float
    rows: int
    controls: tuple[float, ...] = ()

    @property
    def is_open(self) -> bool:
        """Whether nothing measured so far excludes that the losses decide."""
        better = min(self.t, self.t_beyond_base) >= MIN_T and self.rows >= MIN_ROWS
        return better and all(t <= -MIN_T for t in self.controls)

    @property
    def decides(self) -> bool:
        """Whether they say QLoRA."""
        return self.is_open and len(self.controls) == CONTROLS

    @property
    def confidence(self) -> str:
        """The weakest of the tests."""
        return f"t = {min(self.t, self.t_beyond_base, *(-t for t in self.controls)):.1f} on {self.rows} rows"

    @property
    def sentence(self) -> str:
        controls = ", ".join(f"{t:.1f}" for t in self.controls)
        return (
            f"measured: loss of answers {self.full:.4f} on full-precision and {self.four_bit:.4f} on 4-bit weights, "
            f"t = {self.t:.1f} on {self.rows} rows, and {self.t_beyond_base:.1f} beyond the bases' own difference"
            f"{f', random errors {controls}' if controls else ''}: {self._meaning()}"
        )

    def _meaning(self) -> str:
        if self.decides:
            return "so it was trained against the 4-bit weights"
        least = min(self.t, self.t_beyond_base)
        if self.rows < MIN_ROWS:
            return f"undecided: give {MIN_ROWS} rows with answers or more"
        if 0 < least < MIN_T:
            needed = math.ceil(self.rows * (MIN_T / least) ** 2)
            return f"undecided: t of {MIN_T:g} would speak for QLoRA; if it is one, about {needed} rows are needed"
        if least > 0:
            return "undecided: random errors of the same size do the same"
        return "undecided: a LoRA is like this, and so is a QLoRA after a short training or on few rows"


def compare_losses(
    checkpoint: Checkpoint, base: BaseModel, quantizer: Nf4, tokens: TokenizedText, progress: Progress
) -> LossComparison:
    """The losses of W16 + D and of dq + D on the answers, and as many controls as are needed."""
    rows = [(row, mask) for row, mask in zip(tokens.measured, tokens.answer_masks, strict=True) if bool(mask.any())]
    full, full_base = _losses_with_base(base, None, checkpoint, rows, "full precision", progress)
    four_bit, four_bit_base = _losses_with_base(base, quantizer, checkpoint, rows, "4 bits", progress)
    gained = _differences(full, four_bit)
    comparison = LossComparison(
        full=_mean(full),
        four_bit=_mean(four_bit),
        t=_t(gained),
        t_beyond_base=_t(_differences(gained, _differences(full_base, four_bit_base))),
        rows=len(rows),
    )
    for seed in range(CONTROLS):
        if not comparison.is_open:
            break
        control = _model(base, _with_random_errors(base, quantizer, seed), checkpoint)
        (losses,) = _row_losses(control, rows, (nullcontext,), f"random errors, {seed + 1} of {CONTROLS}", progress)
        comparison = replace(comparison, controls=(*comparison.controls, _t(_differences(full, losses))))
    return comparison


def _with_random_errors(base: BaseModel, quantizer: Nf4, seed: int) -> ReadWeight:
    """The weights of the base with the quantization error of every weight in a random sign."""
    import torch

    seeds = {module: seed * len(base.linears) + number for number, module in enumerate(base.linears)}

    def read(linear: Linear) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seeds[linear.module])
        full = base.read(linear).float()
        signs = torch.randint(0, 2, full.shape, generator=generator, dtype=torch.int8)
        error = (full - base.read_as_trained(linear, quantizer)).mul_(2 * signs - 1)
        return full.sub_(error)

    return read


def _model(base: BaseModel, read: ReadWeight, checkpoint: Checkpoint) -> StreamedModel:
    return StreamedModel(
        base, read, adapt=lambda plain: with_adapter(plain, checkpoint), held=changed_weights(checkpoint)
    )


def _losses_with_base(
    base: BaseModel,
    quantizer: Nf4 | None,
    checkpoint: Checkpoint,
    rows: Sequence[tuple[torch.Tensor, torch.Tensor]],
    weights_name: str,
    progress: Progress,
) -> tuple[list[float], list[float]]:
    """The rows' losses with the adapter and without it."""
    is_read_again = sum(row.shape[1] for row, _ in rows) > GROUP_TOKENS
    adapted = _model(base, weights_as_trained(base, quantizer, read_again=is_read_again), checkpoint)
    variants = (nullcontext, adapted.model.disable_adapter)
    losses, of_base = _row_losses(adapted, rows, variants, weights_name, progress)
    return losses, of_base


def _row_losses(
    model: StreamedModel,
    rows: Sequence[tuple[torch.Tensor, torch.Tensor]],
    variants: Sequence[Variant],
    weights_name: str,
    progress: Progress,
) -> list[list[float]]:
    """For each variant the mean loss of the answers of every row (1, tokens)."""
    import torch

    token_losses: list[list[torch.Tensor]] = [[] for _ in variants]
    with torch.inference_mode():
        for group, states in model.hidden_states([row for row, _ in rows], variants, f"on {weights_name}", progress):
            next_ids = torch.cat([row[0, 1:] for row in group])
            lengths = [row.shape[1] - 1 for row in group]
            for losses, variant, of_variant in zip(token_losses, variants, states, strict=True):
                losses += model.token_losses(of_variant, next_ids, variant).split(lengths)
    masks = [mask for _, mask in rows]
    return [
        [float(row[mask].double().mean()) for row, mask in zip(losses, masks, strict=True)] for losses in token_losses
    ]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _differences(left: Sequence[float], right: Sequence[float]) -> list[float]:
    return [one - other for one, other in zip(left, right, strict=True)]


def _t(differences: Sequence[float]) -> float:
    """Student's t of paired samples: the mean difference over its standard error; 0 for fewer than two rows."""
    count = len(differences)
    if count < 2:
        return 0.0
    mean = _mean(differences)
    variance = sum((difference - mean) ** 2 for difference in differences) / (count - 1)
    return mean / math.sqrt(variance / count) if variance else 0.0
