"""Retention: how much of the adapter's delta is in the written weights, weight by weight.

With D = s·B·A the delta, W the weights it was added to and W' the weights that are stored, dequantized,

    retention = ⟨W' - W, D⟩ / ⟨D, D⟩

the change projected on the delta. It is 1 where the whole delta is there, and 0 where the weights are as if nothing had
been added. That happens on the same 4-bit grid, for example: its steps are larger than D, so rounding removes D.
Rounding that is independent of D adds noise around 1, not a loss. `signs` is the share of elements whose change has the
sign of D's element.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from convert.artifact import Retention
from convert.inputs.adapter_checkpoint import Checkpoint
from convert.inputs.base_model import BaseModel
from convert.progress import Progress
from convert.quantization.format import QuantizationFormat

if TYPE_CHECKING:
    import torch

# Rows in float64 at once: 25 MB of each matrix at a width of 8192.
_BLOCK_ROWS = 384


@dataclass(frozen=True)
class TensorRetention:
    """The retention of one module's weight."""

    module: str
    retention: float
    signs: float


@dataclass(frozen=True)
class ModelRetention:
    """The retention of every module with a delta, and its summary."""

    tensors: tuple[TensorRetention, ...]

    @property
    def summary(self) -> Retention:
        """The plain mean over modules, and the module that keeps least."""
        least = min(self.tensors, key=lambda tensor: tensor.retention)
        mean = sum(tensor.retention for tensor in self.tensors) / len(self.tensors)
        return Retention(mean=mean, least=least.retention, least_module=least.module)


def measure_retention(
    checkpoint: Checkpoint, base: BaseModel, quantizer: QuantizationFormat | None, written: Path, progress: Progress
) -> ModelRetention | None:
    """Compare a written merged model with what went into it. One weight and its delta are in memory at a time.

    `quantizer`: of the base, before the delta was added; None where the delta was added to the original weights.
    A separate adapter needs no measurement, since its retention is 1 by construction. None where no module has a delta.
    """
    result = BaseModel.open(written)
    retentions = []
    for done, (module, weights) in enumerate(checkpoint.lora_weights.items(), start=1):
        a, b = checkpoint.read(weights)
        if weights.scaling and a.any() and b.any():
            delta = (b.float() @ a.float()).mul_(weights.scaling)
            before, after = _weight(base, module, quantizer), _weight(result, module, None)
            retentions.append(tensor_retention(module, after, before, delta))
        progress("measuring retention", done, len(checkpoint.lora_weights))
    return ModelRetention(tuple(retentions)) if retentions else None


def tensor_retention(module: str, written: torch.Tensor, before: torch.Tensor, delta: torch.Tensor) -> TensorRetention:
    """The retention of one weight (out, in), in float64. `delta` must have an element that is not zero."""
    projected, squares, same_sign, nonzero = 0.0, 0.0, 0, 0
    for change, d in _blocks(written, before, delta):
        projected += float((change * d).sum())
        squares += float((d * d).sum())
        same_sign += int(((change.sign() == d.sign()) & (d != 0)).sum())
        nonzero += int((d != 0).sum())
    return TensorRetention(module, projected / squares, same_sign / nonzero)


def _blocks(
    written: torch.Tensor, before: torch.Tensor, delta: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    parts = (matrix.split(_BLOCK_ROWS) for matrix in (written, before, delta))
    for after, unmerged, d in zip(*parts, strict=True):
        yield after.double() - unmerged.double(), d.double()


def _weight(model: BaseModel, module: str, quantizer: QuantizationFormat | None) -> torch.Tensor:
    """A module's weight in float32. A head that is tied to the embedding has the weight of the embedding."""
    linear = model.linears.get(module)
    if linear is None:
        return model.tensors.read(model.architecture.embedding).float()
    return model.read_as_trained(linear, quantizer)
