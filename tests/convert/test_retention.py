"""Why a 4-bit merge of a QLoRA adapter is refused: what is left of the delta on the grid it was trained against."""

from __future__ import annotations

import torch

from convert.nf4 import Nf4


def retention(delta: torch.Tensor, written: torch.Tensor, before: torch.Tensor) -> float:
    """Share of the delta that survives: the change in the written weights, projected on the delta."""
    return float(((written - before) * delta).sum() / (delta * delta).sum())


def _there_and_back(weight: torch.Tensor, scheme: Nf4) -> torch.Tensor:
    return scheme.dequantize("w", scheme.quantize("w", weight))


def test_the_same_4_bit_grid_rounds_the_delta_away_and_16_bits_keep_it() -> None:
    torch.manual_seed(3)
    dequantized = _there_and_back(torch.randn(256, 256) * 0.05, Nf4())
    delta = (torch.randn(256, 8) @ torch.randn(8, 256)) * 0.05 * 0.01 / 8**0.5  # 1 % of the weights

    same_grid = _there_and_back(dequantized + delta, Nf4(double=False))
    in_16_bits = (dequantized + delta).to(torch.bfloat16).float()

    assert retention(delta, same_grid, dequantized) < 0.1
    assert retention(delta, in_16_bits, dequantized) > 0.95
