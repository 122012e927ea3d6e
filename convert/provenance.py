"""What an adapter was trained on, measured where nothing says it. Two kinds of evidence, of different worth.

Of the weights: training against dq = dequantized NF4(W16) partly undoes the quantization error, so the delta D of a
QLoRA leans towards q = W16 - dq; one trained on W16 has no way to know q. With

    z = Σ D·q / sqrt(Σ D²·q²)   over every weight of every adapted module,

an adapter that knows nothing of q has a z of mean 0 and variance 1: given their sizes, the signs of q are as good as
random. The control is the same with the rows of q in other places, where they belong to other weights. A large z with a
small control speaks for QLoRA. A small z says nothing: short trainings lean too little.

Of the function: the mean loss of W16 + D and of dq + D on rows of text, row by row. It says on which weights the
adapter is better on this text, not on which it was trained: the full-precision base is the better model to begin
with, and that can outweigh what belongs to the adapter.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from convert import lora
from convert.as_trained import with_adapter
from convert.base_model import BaseModel
from convert.checkpoint import Checkpoint
from convert.detect import Training
from convert.errors import BaseMismatch
from convert.nf4 import Nf4
from convert.progress import Progress
from convert.quality import load

if TYPE_CHECKING:
    import torch

LEAST_Z = 4.0
MOST_CONTROL = 3.0
LEAST_T = 3.0
LEAST_ROWS = 8

# Quarters of the rows that q is moved by for the control: the columns, which activations make uneven, stay.
_SHIFTS = (1, 2, 3)


@dataclass(frozen=True)
class Alignment:
    """z of the quantization error, and the largest |z| of it moved elsewhere."""

    z: float
    control: float

    @property
    def is_strong(self) -> bool:
        return self.z >= LEAST_Z and self.control <= MOST_CONTROL


@dataclass(frozen=True)
class Losses:
    """Mean loss in nats a token of one adapter on two forms of its base; `t` of their difference, paired by row.

    t > 0: smaller on the 4-bit weights. It is 0 where there are too few rows for a difference.
    """

    full: float
    four_bit: float
    t: float
    rows: int

    @property
    def is_decided(self) -> bool:
        return abs(self.t) >= LEAST_T and self.rows >= LEAST_ROWS


@dataclass(frozen=True)
class Measured:
    """Everything measured of an adapter whose training nobody tells. Losses are None without text.

    `verdict`: QLORA where the weights say so; else the form it is better on, where the difference is significant;
    else UNKNOWN. `decided_by` says which.
    """

    z: float
    control: float
    loss_full: float | None
    loss_4bit: float | None
    t: float | None
    rows: int
    verdict: Training
    decided_by: str | None
    lines: tuple[str, ...]


def measured(
    checkpoint: Checkpoint,
    base: BaseModel,
    rows: Sequence[Sequence[int]] | None,
    progress: Progress,
    quantizer: Nf4 | None = None,
) -> Measured:
    """Measure the weights, and the function on `rows` of token ids where there are any: one model at a time.

    `quantizer`: what a QLoRA would have used; by default NF4 with double quantization. Raises BaseMismatch for a base
    that isn't full precision: from a 4-bit form alone q can't be known.
    """
    if base.is_quantized:
        raise BaseMismatch(
            f"To measure what the adapter was trained on takes the full-precision base; {base.root} holds only its "
            "4-bit form. Give the original model directory with --base, or say it with --trained-on."
        )
    quantizer = quantizer or Nf4(True, base.dtype)
    weights = alignment(checkpoint, base, quantizer, progress)
    function = losses(checkpoint, base, quantizer, rows, progress) if rows else None
    verdict, decided_by = _verdict(weights, function)
    return Measured(
        z=weights.z,
        control=weights.control,
        loss_full=function.full if function else None,
        loss_4bit=function.four_bit if function else None,
        t=function.t if function else None,
        rows=function.rows if function else 0,
        verdict=verdict,
        decided_by=decided_by,
        lines=_lines(weights, function),
    )


def alignment(checkpoint: Checkpoint, base: BaseModel, quantizer: Nf4, progress: Progress) -> Alignment:
    """Of all adapted modules that a quantizer changes. One weight in memory at a time."""
    import torch

    sums = [0.0] * (1 + len(_SHIFTS))
    squares = [0.0] * (1 + len(_SHIFTS))
    for done, (module, pair) in enumerate(checkpoint.pairs.items(), start=1):
        linear = base.linears.get(module)
        if linear and not linear.is_head:
            a, b = checkpoint.read(pair)
            error = base.read(linear).float() - base.read_as_trained(linear, quantizer)
            delta = lora.add_delta(torch.zeros(linear.shape), a, b, pair.scaling)
            for index, shift in enumerate((0, *_SHIFTS)):
                product = delta * error.roll(shift * linear.out_features // 4, dims=0)
                sums[index] += float(product.sum(dtype=torch.float64))
                squares[index] += float(product.square_().sum(dtype=torch.float64))
        progress("comparing with the quantization error", done, len(checkpoint.pairs))
    z, *controls = (each / math.sqrt(square) if square else 0.0 for each, square in zip(sums, squares, strict=True))
    return Alignment(z, max(map(abs, controls)))


def losses(
    checkpoint: Checkpoint, base: BaseModel, quantizer: Nf4, rows: Sequence[Sequence[int]], progress: Progress
) -> Losses:
    """Of W16 + D and of dq + D on rows of token ids, each of two or more."""
    import torch

    tensors = [torch.tensor([list(row)]) for row in rows if len(row) > 1]
    full = _losses(checkpoint, base, None, tensors, "full precision", progress)
    four_bit = _losses(checkpoint, base, quantizer, tensors, "4 bits", progress)
    return Losses(_mean(full), _mean(four_bit), _paired_t(full, four_bit), len(full))


def _losses(
    checkpoint: Checkpoint,
    base: BaseModel,
    quantizer: Nf4 | None,
    rows: Sequence[torch.Tensor],
    what: str,
    progress: Progress,
) -> list[float]:
    """Mean loss of every row."""
    import torch
    from torch.nn.functional import cross_entropy

    gc.collect()
    model = with_adapter(load(base, quantizer), checkpoint)
    found = []
    for done, row in enumerate(rows, start=1):
        with torch.inference_mode():
            logits = model(row, use_cache=False).logits[0, :-1]
            found.append(float(cross_entropy(logits.double(), row[0, 1:])))
        progress(f"measuring on {what}", done, len(rows))
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _paired_t(ones: Sequence[float], others: Sequence[float]) -> float:
    """Mean difference over its standard error; 0 where one row or none leaves that unknown."""
    differences = [one - other for one, other in zip(ones, others, strict=True)]
    count = len(differences)
    if count < 2:
        return 0.0
    mean = _mean(differences)
    variance = sum((each - mean) ** 2 for each in differences) / (count - 1)
    return mean / math.sqrt(variance / count) if variance else 0.0


def _verdict(weights: Alignment, function: Losses | None) -> tuple[Training, str | None]:
    if weights.is_strong:
        return Training.QLORA, "weights"
    if function and function.is_decided:
        return (Training.QLORA if function.t > 0 else Training.LORA), "function"
    return Training.UNKNOWN, None


def _lines(weights: Alignment, function: Losses | None) -> tuple[str, ...]:
    says = (
        "so it was trained against the 4-bit weights"
        if weights.is_strong
        else f"which says nothing: {LEAST_Z:g} and a control of at most {MOST_CONTROL:g} would speak for QLoRA"
    )
    lines = [
        f"measured: the delta leans towards the quantization error of NF4 with z = {weights.z:.2f} "
        f"(control {weights.control:.2f}), {says}"
    ]
    if function:
        better = "4-bit" if function.t > 0 else "full-precision"
        says = (
            f"significantly better on {better} weights, on this text, whatever it was trained on"
            if function.is_decided
            else f"undecided: |t| of {LEAST_T:g} on {LEAST_ROWS} rows or more would be significant"
        )
        lines.append(
            f"measured: loss {function.full:.4f} on full-precision and {function.four_bit:.4f} on 4-bit weights, "
            f"t = {function.t:.1f} on {function.rows} rows: {says}"
        )
    return tuple(lines)
