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


def normalised(weight: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
    """DoRA's sum: each row of `weight` (out, in), in place, brought to the length that `magnitude` (out,) says.

    https://arxiv.org/abs/2402.09353, equation 5: W' = m · (W + D) / ‖W + D‖.
    """
    import torch

    return weight.mul_((magnitude.float() / torch.linalg.vector_norm(weight, dim=1)).unsqueeze(1))


def by_halves(b: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows (heads · head_dim, r) from the order in which rotary embeddings turn neighbours to that which turns halves.

    Within a head: 0, 1, 2, 3, … becomes 0, 2, …, 1, 3, …
    """
    rank = b.shape[1]
    return b.reshape(-1, head_dim // 2, 2, rank).transpose(1, 2).reshape(-1, rank)
