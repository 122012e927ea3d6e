"""Low-rank fits: an adapter that holds its own delta and most of the difference between two sets of weights.

An adapter with the delta D that was trained on weights T is to be used on other weights O. On O it would need the
delta D + (T - O), which no A and B of a small rank hold. Of rank R, with D (rank r) kept exactly, the best is

    D + U·Uᵀ·E,   E = T - O,   U (out, R - r): the directions in which the outputs E·x are largest

For any second moment C of the inputs (the mean of x·xᵀ over the tokens of a text), U·Uᵀ·E minimises the mean of
|(E - F)·x|² over all F of that rank: this is Eckart and Young's theorem for E·C^½, whose left singular vectors are U.
Without a text C is the identity, and the fit is the truncated singular value decomposition of E. QERA
(arXiv 2410.06040) weights by the whole of C as well, LQER (arXiv 2402.02446) by its diagonal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from convert.artifact import VLLM_LORA_RANKS
from convert.errors import RouteRefused

if TYPE_CHECKING:
    import torch

# Rank 1 is left out: an adapter's own delta takes it up, which leaves no room for a correction.
RANKS = tuple(rank for rank in VLLM_LORA_RANKS if rank > 1)

# The weight of C's own diagonal in C: a direction that a short text never takes still counts by the size of its inputs.
_DIAGONAL_WEIGHT = 0.1
_LEAST_DEFAULT_RANK = 64
_OVERSAMPLING = 16
_ITERATIONS = 6
_SEED = 20


@dataclass(frozen=True)
class LowRankFit:
    """A (rank, in) and B (out, rank) of a delta of scale 1, float32.

    `residual`: size of the difference that B·A leaves, over the size of the whole difference; of outputs where
    activations were given, else of weights. 0 where there was no difference.
    """

    a: torch.Tensor
    b: torch.Tensor
    residual: float


def default_rank(trained: int) -> int:
    """The rank of a corrected adapter, where the user names none: one that vLLM serves.

    Half of it is for the correction: twice the rank of the trained adapter and at least 64, raised to the next rank
    that vLLM serves. Where there is none, the largest, and less is left for the correction.
    """
    wanted = max(_LEAST_DEFAULT_RANK, 2 * trained)
    return next((rank for rank in RANKS if rank >= wanted), RANKS[-1])


def require_rank(rank: int, least: int) -> None:
    """Raises RouteRefused for a rank that vLLM doesn't take, or that doesn't hold the adapter's own delta."""
    if rank in RANKS and rank >= least:
        return
    allowed = ", ".join(str(allowed_rank) for allowed_rank in RANKS if allowed_rank >= least)
    raise RouteRefused(
        f"Rank {rank} does not fit this adapter of rank {least}: "
        + (f"choose one of {allowed}." if allowed else f"vLLM serves ranks up to {RANKS[-1]}.")
    )


def fit(difference: torch.Tensor, rank: int, activations: torch.Tensor | None = None) -> LowRankFit:
    """The best A and B of `rank` for a difference (out, in), weighted by `activations` (tokens, in) where given.

    By subspace iteration with a fixed seed (Halko, Martinsson, Tropp, arXiv 0909.4061): the same on every run of the
    same machine.
    """
    import torch

    difference = difference.float()
    out_features, in_features = difference.shape
    a, b = difference.new_zeros(rank, in_features), difference.new_zeros(out_features, rank)
    moment = _SecondMoment.of(activations, difference)
    total = moment.mean_square_output(difference)
    if not total or not rank:
        return LowRankFit(a, b, 1.0 if total else 0.0)
    directions = _leading_directions(difference, min(rank, out_features), moment)
    projection = directions.T @ difference
    fitted = moment.mean_square_output(projection)
    # A and B get rows and columns of equal norm, so that a training that starts here moves both at the same rate.
    norms = projection.norm(dim=1).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    a[: len(norms)] = projection / norms[:, None]
    b[:, : len(norms)] = directions * norms
    return LowRankFit(a, b, max(0.0, 1.0 - fitted / total) ** 0.5)


def fit_beside_delta(
    difference: torch.Tensor,
    delta: tuple[torch.Tensor, torch.Tensor, float] | None,
    rank: int,
    activations: torch.Tensor | None = None,
) -> LowRankFit:
    """A and B of `rank` for `delta` (its A, B and scale), kept exactly, plus the best fit of `difference`."""
    import torch

    if delta is None:
        return fit(difference, rank, activations)
    delta_a, delta_b, scale = delta
    correction = fit(difference, rank - delta_a.shape[0], activations)
    a, b = delta_a.float().to(correction.a.device), delta_b.float().to(correction.b.device) * scale
    return LowRankFit(torch.cat([a, correction.a]), torch.cat([b, correction.b], dim=1), correction.residual)


@dataclass(frozen=True)
class _SecondMoment:
    """C = the mean of x·xᵀ over the activations, mixed with its own diagonal; without activations the identity.

    The matrix (in, in) is never formed: products with it go through the activations (tokens, in).
    """

    activations: torch.Tensor | None
    diagonal: torch.Tensor | None

    @classmethod
    def of(cls, activations: torch.Tensor | None, difference: torch.Tensor) -> _SecondMoment:
        """In the type and on the device of `difference`."""
        if activations is None:
            return cls(None, None)
        activations = activations.to(difference.device, difference.dtype)
        return cls(activations, activations.square().mean(0))

    def right_multiply(self, rows: torch.Tensor) -> torch.Tensor:
        """rows · C, for rows of shape (any, in)."""
        if self.activations is None:
            return rows
        product = (rows @ self.activations.T) @ self.activations / len(self.activations)
        return (1 - _DIAGONAL_WEIGHT) * product + _DIAGONAL_WEIGHT * rows * self.diagonal

    def mean_square_output(self, rows: torch.Tensor) -> float:
        """The trace of rows · C · rowsᵀ: the mean of |rows · x|²."""
        if self.activations is None or self.diagonal is None:
            return float(rows.double().square().sum())
        full = (rows @ self.activations.T).double().square().sum() / len(self.activations)
        diagonal = (rows.square() * self.diagonal).double().sum()
        return float((1 - _DIAGONAL_WEIGHT) * full + _DIAGONAL_WEIGHT * diagonal)


def _leading_directions(difference: torch.Tensor, rank: int, moment: _SecondMoment) -> torch.Tensor:
    """The first `rank` eigenvectors (out, rank) of E·C·Eᵀ."""
    import torch

    def multiply(vectors: torch.Tensor) -> torch.Tensor:
        """E·C·Eᵀ · vectors."""
        return difference @ moment.right_multiply(vectors.T @ difference).T

    out_features = difference.shape[0]
    width = min(out_features, rank + _OVERSAMPLING)
    generator = torch.Generator().manual_seed(_SEED)
    basis = torch.randn(out_features, width, generator=generator).to(difference.device)
    if width < out_features:
        for _ in range(_ITERATIONS):
            basis = torch.linalg.qr(multiply(basis)).Q
    basis = torch.linalg.qr(basis).Q
    # Rayleigh-Ritz: the eigenvectors of E·C·Eᵀ restricted to the subspace.
    restricted = (basis.T @ multiply(basis)).double()
    eigenvectors = torch.linalg.eigh((restricted + restricted.T) / 2).eigenvectors
    return basis @ eigenvectors.flip(1)[:, :rank].float()
