"""The arithmetic of LoRA (https://arxiv.org/abs/2106.09685): a linear layer y = W x becomes y = W x + s B (A x).

    x (in) ──▶ W (out, in) ───────────────────────▶ + ──▶ y (out)
       └─────▶ A (r, in) ──▶ B (out, r) ──▶ · s ───┘

so the adapter's delta is D = s·B·A, of W's shape, with s = alpha / r, or s = alpha / sqrt(r) in rsLoRA
(https://arxiv.org/abs/2312.03732).
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
    """The same delta at a larger rank: zero rows are added to A, zero columns to B."""
    from torch.nn.functional import pad

    missing = rank - a.shape[0]
    return pad(a, (0, 0, 0, missing)), pad(b, (0, missing))


def dora_rescale(weight: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
    """Scale each row of `weight` (out, in), which is W + D, to the norm in `magnitude` (out,). In place.

    DoRA, https://arxiv.org/abs/2402.09353, equation 5: W' = m · (W + D) / ‖W + D‖.
    """
    import torch

    return weight.mul_((magnitude.float() / torch.linalg.vector_norm(weight, dim=1)).unsqueeze(1))


def unpermute_rotary(b: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Reorder the rows of B (heads · head_dim, r) of q or k from torchtune's order to that of transformers.

    torchtune's rotary embedding rotates neighbouring rows of a head, 2i and 2i+1; that of transformers rotates row i
    with row i + head_dim/2. So the rows 0, 1, 2, 3, … of a head become 0, 2, …, 1, 3, … The inverse is `permute` of
    transformers' `convert_llama_weights_to_hf.py`.
    """
    rank = b.shape[1]
    return b.reshape(-1, head_dim // 2, 2, rank).transpose(1, 2).reshape(-1, rank)
