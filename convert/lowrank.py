"""Low-rank correction: an adapter carries, beside its own delta, most of what one set of weights differs from another.

An adapter with the delta D that was trained on weights T is to be used on other weights O. On O it would need the
delta D + (T - O), which no pair of halves of a small rank holds. Of rank R, with D kept exactly, the best is

    D + U·Uᵀ·E,   E = T - O,   U (out, R - r): the directions in which the outputs E·x are largest

since for any weighting C of the inputs (C = the mean of x·xᵀ over the tokens of a text) U·Uᵀ·E minimises
the mean of |(E - F)·x|² over all F of that rank: Eckart and Young's theorem for E·C^½, whose left singular vectors
are U. Without a text C is the identity and this is the truncated singular value decomposition of E. The same
weighting, by the whole of C or by its diagonal: QERA, arXiv 2410.06040, and LQER, arXiv 2402.02446.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from convert.errors import RouteRefused
from convert.progress import Progress

if TYPE_CHECKING:
    import torch

# What vLLM's --max-lora-rank takes; its 1 leaves nothing to correct with.
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)

# Inputs of this many tokens are kept, 16 bits a number: 2 GB for a model of 3 billion weights.
MAX_TOKENS = 2048

# Part of C that is its own diagonal: a direction that a short text never takes still counts by the size of its inputs.
_DIAGONAL = 0.1
_OVERSAMPLED = 16
_ITERATIONS = 6
_SEED = 20

Inputs = Mapping[str, "torch.Tensor"]
"""Module -> the inputs (tokens, in) that it was seen with. Modules that read the same share one tensor."""


@dataclass(frozen=True)
class Fit:
    """Halves of a delta: A (rank, in) and B (out, rank), float32, of scale 1.

    `residual`: size of what B·A leaves of the difference, over the size of the difference; of outputs where inputs
    were given, else of weights. 0 where there was no difference.
    """

    a: torch.Tensor
    b: torch.Tensor
    residual: float


def require_rank(rank: int, least: int) -> None:
    """Raises RouteRefused for a rank that vLLM doesn't take, or that doesn't hold the adapter's own delta."""
    if rank in RANKS and rank >= least:
        return
    works = ", ".join(str(each) for each in RANKS if each >= least)
    raise RouteRefused(
        f"Rank {rank} can't carry this adapter of rank {least} to a server"
        + (f": it must be one of {works}." if works else f", and no rank that vLLM takes can: it ends at {RANKS[-1]}.")
    )


def fit(difference: torch.Tensor, rank: int, inputs: torch.Tensor | None = None) -> Fit:
    """The best halves of `rank` for a difference (out, in), weighted by `inputs` (tokens, in) where given.

    By subspace iteration with a fixed seed (Halko, Martinsson, Tropp, arXiv 0909.4061): the same on every run of the
    same machine.
    """
    import torch

    difference = difference.float()
    out, columns = difference.shape
    a, b = difference.new_zeros(rank, columns), difference.new_zeros(out, rank)
    weighting = _Weighting.of(inputs, difference) if inputs is not None else _Weighting(None, None)
    size = weighting.size(difference)
    if not size or not rank:
        return Fit(a, b, 1.0 if size else 0.0)
    directions = _directions(difference, min(rank, out), weighting)
    halves = directions.T @ difference
    caught = weighting.size(halves)
    # Both halves of one size each: what is trained on from here takes steps of one size in both.
    norms = halves.norm(dim=1).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    a[: len(norms)] = halves / norms[:, None]
    b[:, : len(norms)] = directions * norms
    return Fit(a, b, max(0.0, 1.0 - caught / size) ** 0.5)


def corrected(
    difference: torch.Tensor,
    delta: tuple[torch.Tensor, torch.Tensor, float] | None,
    rank: int,
    inputs: torch.Tensor | None = None,
) -> Fit:
    """Halves of `rank` for `delta` (A, B and their scale), exact, plus the best fit of the difference beside it."""
    import torch

    if delta is None:
        return fit(difference, rank, inputs)
    own_a, own_b, scale = delta
    rest = fit(difference, rank - own_a.shape[0], inputs)
    a, b = own_a.float().to(rest.a.device), own_b.float().to(rest.b.device) * scale
    return Fit(torch.cat([a, rest.a]), torch.cat([b, rest.b], dim=1), rest.residual)


class InputRecorder:
    """While its context is open, what each module of a model reads is kept, up to MAX_TOKENS, in bfloat16."""

    def __init__(self, model: Any, modules: Collection[str]) -> None:
        self._model = model
        self._modules = modules
        self._pieces: dict[str, list[torch.Tensor]] = {}
        self._leaders: dict[str, str] = {}
        self._latest: tuple[torch.Tensor | None, str] = (None, "")
        self._hooks: list[Any] = []

    def __enter__(self) -> Self:
        for module in self._modules:
            hook = self._model.get_submodule(module).register_forward_pre_hook(partial(self._record, module))
            self._hooks.append(hook)
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._latest = (None, "")

    @property
    def tokens(self) -> int:
        return max((sum(map(len, pieces)) for pieces in self._pieces.values()), default=0)

    def inputs(self) -> Inputs:
        """Everything that was kept."""
        import torch

        joined = {module: torch.cat(pieces) for module, pieces in self._pieces.items()}
        return {module: joined[leader] for module, leader in self._leaders.items()}

    def _record(self, module: str, _: Any, given: tuple[torch.Tensor, ...]) -> None:
        latest, leader = self._latest
        if latest is given[0]:  # the projections to queries, keys and values follow each other
            self._leaders[module] = leader
            return
        self._latest, self._leaders[module] = (given[0], module), module
        pieces = self._pieces.setdefault(module, [])
        left = MAX_TOKENS - sum(map(len, pieces))
        if left > 0:
            rows = given[0].detach().reshape(-1, given[0].shape[-1])
            pieces.append(rows[:left].bfloat16().cpu())


def record_inputs(model: Any, modules: Collection[str], rows: Sequence[torch.Tensor], progress: Progress) -> Inputs:
    """What each module reads while the model goes over rows (1, tokens), until there are enough."""
    import torch

    with InputRecorder(model, modules) as recorder, torch.inference_mode():
        for done, row in enumerate(rows):
            if recorder.tokens >= MAX_TOKENS:
                break
            progress("reading the layers' inputs", done, len(rows))
            model(row, use_cache=False, logits_to_keep=1)
    progress("reading the layers' inputs", len(rows), len(rows))
    return recorder.inputs()


@dataclass(frozen=True)
class _Weighting:
    """C of the inputs, never written out: it would be of (in, in). None: the identity."""

    inputs: torch.Tensor | None
    mean_squares: torch.Tensor | None

    @classmethod
    def of(cls, inputs: torch.Tensor, like: torch.Tensor) -> _Weighting:
        inputs = inputs.to(like.device, like.dtype)
        return cls(inputs, inputs.square().mean(0))

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """rows · C, of (any, in)."""
        if self.inputs is None:
            return rows
        seen = (rows @ self.inputs.T) @ self.inputs / len(self.inputs)
        return (1 - _DIAGONAL) * seen + _DIAGONAL * rows * self.mean_squares

    def size(self, rows: torch.Tensor) -> float:
        """The trace of rows · C · rowsᵀ: the mean of |rows · x|²."""
        if self.inputs is None or self.mean_squares is None:
            return float(rows.double().square().sum())
        seen = (rows @ self.inputs.T).double().square().sum() / len(self.inputs)
        spread = (rows.square() * self.mean_squares).double().sum()
        return float((1 - _DIAGONAL) * seen + _DIAGONAL * spread)


def _directions(difference: torch.Tensor, rank: int, weighting: _Weighting) -> torch.Tensor:
    """The first `rank` eigenvectors (out, rank) of E·C·Eᵀ."""
    import torch

    out = difference.shape[0]
    width = min(out, rank + _OVERSAMPLED)
    generator = torch.Generator().manual_seed(_SEED)
    basis = torch.randn(out, width, generator=generator).to(difference.device)
    if width < out:
        for _ in range(_ITERATIONS):
            basis = torch.linalg.qr(_applied(difference, weighting, basis)).Q
    basis = torch.linalg.qr(basis).Q
    # Rayleigh and Ritz: the best directions inside the subspace that was found.
    inside = (basis.T @ _applied(difference, weighting, basis)).double()
    vectors = torch.linalg.eigh((inside + inside.T) / 2).eigenvectors
    return basis @ vectors.flip(1)[:, :rank].float()


def _applied(difference: torch.Tensor, weighting: _Weighting, vectors: torch.Tensor) -> torch.Tensor:
    """E·C·Eᵀ · vectors."""
    return difference @ weighting(vectors.T @ difference).T
