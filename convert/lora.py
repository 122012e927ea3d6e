"""LoRA arithmetic. A linear layer y = W x becomes y = W x + s B (A x):

    x (in) ──▶ W (out, in) ───────────────────────▶ + ──▶ y (out)
       └─────▶ A (r, in) ──▶ B (out, r) ──▶ · s ───┘

so the adapter's delta is D = s·B·A, of W's shape, with s = alpha / r, or alpha / sqrt(r) in rsLoRA.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def scaling(alpha: float, rank: int, *, rslora: bool) -> float:
    """The factor s of a module's delta."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def add_delta(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """`weight + scale * B @ A` in float32, in place; `weight` must be float32 of shape (out, in)."""
    return weight.addmm_(b.float(), a.float(), alpha=scale)


def padded(a: torch.Tensor, b: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same delta at a larger rank: zero rows below A, zero columns right of B."""
    from torch.nn.functional import pad

    missing = rank - a.shape[0]
    return pad(a, (0, 0, 0, missing)), pad(b, (0, missing))
