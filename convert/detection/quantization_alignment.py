"""Measures whether an adapter was trained on full-precision or on 4-bit weights, where no file says so.

There are two measurements.

The weights. Training against dq = dequantized NF4(W16) partly undoes the quantization error. So the delta D of a QLoRA
leans towards the error q = W16 - dq, while the delta of a LoRA, trained on W16, is independent of q. With

    z = Σ D·q / sqrt(Σ D²·q²)   over every weight of every adapted module,

an adapter that is independent of q has a z of mean 0 and variance 1: given their sizes, the signs of q are as good as
random. The control is the same z with the rows of q moved, so that they belong to other weights. A large z with a small
control speaks for QLoRA. A small z decides nothing: after a short training the delta leans too little.

The losses, which `detection.losses` compares on the user's text, where the weights decide nothing. They too can speak
for QLoRA only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from convert.detection.losses import LossComparison, compare_losses
from convert.detection.training import Training
from convert.errors import BaseMismatch
from convert.inputs import lora
from convert.inputs.adapter_checkpoint import Checkpoint
from convert.inputs.base_model import BaseModel
from convert.progress import Progress
from convert.quality import TokenizedText
from convert.quantization.nf4 import Nf4

MIN_Z = 4.0
MAX_CONTROL = 3.0

# The control moves q by one, two and three quarters of its rows. Its columns stay in place, because the sizes of D's
# columns differ: they follow the activations.
_CONTROL_SHIFTS = (1, 2, 3)


@dataclass(frozen=True)
class Alignment:
    """z of the quantization error; `control`: the largest |z| of the same error with its rows moved."""

    z: float
    control: float

    @property
    def is_strong(self) -> bool:
        return self.z >= MIN_Z and self.control <= MAX_CONTROL

    @property
    def sentence(self) -> str:
        meaning = (
            "so it was trained against the 4-bit weights"
            if self.is_strong
            else f"which says nothing: {MIN_Z:g} and a control of at most {MAX_CONTROL:g} would speak for QLoRA"
        )
        return (
            f"measured: the delta leans towards the quantization error of NF4 with z = {self.z:.2f} "
            f"(control {self.control:.2f}), {meaning}"
        )


@dataclass(frozen=True)
class TrainingMeasurement:
    """The measurements, and what follows from them; `losses` is None without text and where the weights decide."""

    alignment: Alignment
    losses: LossComparison | None

    @property
    def decided_by(self) -> Literal["alignment", "losses"] | None:
        """The measurement that speaks for QLoRA."""
        if self.alignment.is_strong:
            return "alignment"
        return "losses" if self.losses and self.losses.decides else None

    @property
    def training(self) -> Training:
        """QLORA, or UNKNOWN where nothing decides. No measurement here can show a LoRA."""
        return Training.QLORA if self.decided_by else Training.UNKNOWN

    @property
    def confidence(self) -> str | None:
        """The figure of the deciding measurement; None where nothing decides."""
        if self.decided_by == "losses" and self.losses:
            return self.losses.confidence
        return f"z = {self.alignment.z:.1f}" if self.decided_by else None

    @property
    def sources(self) -> tuple[str, ...]:
        """A sentence for each measurement."""
        return (self.alignment.sentence, self.losses.sentence) if self.losses else (self.alignment.sentence,)


def measure_training(
    checkpoint: Checkpoint,
    base: BaseModel,
    tokens: TokenizedText | None,
    progress: Progress,
    quantizer: Nf4 | None = None,
) -> TrainingMeasurement:
    """Measure the weights and, where they decide nothing and there are `tokens`, the losses.

    One model is in memory at a time. `quantizer`: what a QLoRA would have used; by default NF4 with double
    quantization. Raises BaseMismatch for a base that isn't full precision: q can't be known from 4-bit weights
    alone.
    """
    if base.is_quantized:
        raise BaseMismatch(
            f"Measuring what the adapter was trained on needs the full-precision base; {base.root} holds only its "
            "4-bit form. Give the original model directory with --base, or say it with --trained-on."
        )
    quantizer = quantizer or Nf4(True, base.dtype)
    alignment = measure_alignment(checkpoint, base, quantizer, progress)
    losses = None
    if tokens and not alignment.is_strong:
        losses = compare_losses(checkpoint, base, quantizer, tokens, progress)
    return TrainingMeasurement(alignment, losses)


def measure_alignment(checkpoint: Checkpoint, base: BaseModel, quantizer: Nf4, progress: Progress) -> Alignment:
    """z over all adapted modules that a quantizer changes. One weight is in memory at a time."""
    import torch

    products = [0.0] * (1 + len(_CONTROL_SHIFTS))
    squares = [0.0] * (1 + len(_CONTROL_SHIFTS))
    for done, (module, weights) in enumerate(checkpoint.lora_weights.items(), start=1):
        linear = base.linears.get(module)
        if linear and not linear.is_head:
            a, b = checkpoint.read(weights)
            error = base.read(linear).float() - base.read_as_trained(linear, quantizer)
            delta = lora.add_delta(torch.zeros(linear.shape), a, b, weights.scaling)
            for index, shift in enumerate((0, *_CONTROL_SHIFTS)):
                product = delta * error.roll(shift * linear.out_features // 4, dims=0)
                products[index] += float(product.sum(dtype=torch.float64))
                squares[index] += float(product.square_().sum(dtype=torch.float64))
        progress("comparing with the quantization error", done, len(checkpoint.lora_weights))
    z, *controls = (
        product / math.sqrt(square) if square else 0.0 for product, square in zip(products, squares, strict=True)
    )
    return Alignment(z, max(map(abs, controls)))
