"""How much of the adapter's delta is in the written weights, tensor by tensor.

With D = s·B·A the delta, W the weights it was added to and W' the weights that are stored, dequantized,

    retention = ⟨W' - W, D⟩ / ⟨D, D⟩

the change projected on the delta: 1 where all of it is there, 0 where the weights are as if nothing had been added
(to the same grid, say, where steps are larger than D and rounding takes it away). Rounding that has nothing to do
with D adds noise around 1, not a loss. `signs` is the share of D's elements in whose direction the weight did move.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from convert.artifact import Retention
from convert.base_model import BaseModel
from convert.checkpoint import Checkpoint
from convert.formats import EMBEDDING
from convert.progress import Progress
from convert.scheme import Scheme

if TYPE_CHECKING:
    import torch

# Rows in float64 at once: 25 MB of each matrix at a width of 8192.
_BLOCK_ROWS = 384


@dataclass(frozen=True)
class TensorRetention:
    """Of one module's weight."""

    module: str
    retention: float
    signs: float


@dataclass(frozen=True)
class Retained:
    """Of all modules with a delta, and in short."""

    tensors: tuple[TensorRetention, ...]

    @property
    def summary(self) -> Retention:
        """The plain mean over modules, and the module that keeps least."""
        least = min(self.tensors, key=lambda tensor: tensor.retention)
        mean = sum(tensor.retention for tensor in self.tensors) / len(self.tensors)
        return Retention(mean=mean, least=least.retention, least_module=least.module)


def retention(
    checkpoint: Checkpoint, base: BaseModel, quantizer: Scheme | None, written: Path, progress: Progress
) -> Retained | None:
    """Compare a written merged model with what went into it. One weight and its delta are in memory at a time.

    `quantizer`: what the base was taken through before the delta was added; None: it was added to the original. Where
    the adapter stays separate there is nothing to ask: retention is 1 by construction. None: no module has a delta.
    """
    result = BaseModel.open(written)
    found = []
    for done, pair in enumerate(checkpoint.pairs.values(), start=1):
        a, b = checkpoint.read(pair)
        if pair.scaling and a.any() and b.any():
            delta = (b.float() @ a.float()).mul_(pair.scaling)
            before, after = _weight(base, pair.module, quantizer), _weight(result, pair.module, None)
            found.append(tensor_retention(pair.module, after, before, delta))
        progress("measuring retention", done, len(checkpoint.pairs))
    return Retained(tuple(found)) if found else None


def tensor_retention(module: str, written: torch.Tensor, before: torch.Tensor, delta: torch.Tensor) -> TensorRetention:
    """Of one weight (out, in), in float64. `delta` must have an element that is not zero."""
    projected, squares, kept, moved = 0.0, 0.0, 0, 0
    for change, d in _blocks(written, before, delta):
        projected += float((change * d).sum())
        squares += float((d * d).sum())
        kept += int(((change.sign() == d.sign()) & (d != 0)).sum())
        moved += int((d != 0).sum())
    return TensorRetention(module, projected / squares, kept / moved)


def _blocks(
    written: torch.Tensor, before: torch.Tensor, delta: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    parts = (matrix.split(_BLOCK_ROWS) for matrix in (written, before, delta))
    for after, unmerged, d in zip(*parts, strict=True):
        yield after.double() - unmerged.double(), d.double()


def _weight(model: BaseModel, module: str, quantizer: Scheme | None) -> torch.Tensor:
    """In float32; of a head that is the embedding, the embedding."""
    linear = model.linears.get(module)
    if linear is None:
        return model.tensors.read(EMBEDDING).float()
    return model.read_as_trained(linear, quantizer)
