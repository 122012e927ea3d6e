"""Low-rank fits against the exact decompositions in float64: Eckart and Young say what the best is."""

from __future__ import annotations

import pytest
import torch

from convert.errors import RouteRefused
from convert.quantization.nf4 import Nf4
from convert.routes import low_rank


def quantization_error(rows: int, columns: int) -> torch.Tensor:
    torch.manual_seed(5)
    weight = torch.randn(rows, columns) * 0.05
    quantizer = Nf4()
    return quantizer.dequantize("w", quantizer.quantize("w", weight)) - weight


def uneven_activations(tokens: int, columns: int) -> torch.Tensor:
    """A few directions carry most of what a layer reads, as in real models."""
    torch.manual_seed(6)
    mixing = torch.linalg.qr(torch.randn(columns, columns)).Q * torch.logspace(0, -3, columns)
    return torch.randn(tokens, columns) @ mixing


def size(difference: torch.Tensor) -> float:
    return float(difference.double().norm())


@pytest.mark.parametrize("shape", [(256, 512), (512, 256), (64, 64)])
@pytest.mark.parametrize("rank", [8, 48])
def test_without_activations_it_is_the_truncated_singular_value_decomposition(
    shape: tuple[int, int], rank: int
) -> None:
    error = quantization_error(*shape)

    result = low_rank.fit(error, rank)

    residual = size(error - result.b @ result.a)
    best = float(torch.linalg.svdvals(error.double())[rank:].square().sum().sqrt())
    assert best * (1 - 1e-5) <= residual <= 1.005 * best
    assert result.residual == pytest.approx(residual / size(error), rel=1e-3)


@pytest.mark.parametrize("tokens", [40, 400])
def test_with_activations_it_keeps_outputs_as_well_as_any_matrix_of_its_rank_can(tokens: int) -> None:
    error, activations = quantization_error(96, 128), uneven_activations(tokens, 128)
    x = activations.double()
    second_moment = 0.9 * x.T @ x / tokens + 0.1 * torch.diag(x.square().mean(0))
    root = torch.linalg.cholesky(second_moment)

    result = low_rank.fit(error, 16, activations)

    residual = size((error - result.b @ result.a).double() @ root)
    best = float(torch.linalg.svdvals(error.double() @ root)[16:].square().sum().sqrt())
    assert best * (1 - 1e-5) <= residual <= 1.01 * best
    assert result.residual == pytest.approx(residual / size(error.double() @ root), rel=1e-2)


def test_a_fit_to_some_activations_keeps_the_outputs_of_others() -> None:
    error, activations = quantization_error(96, 128), uneven_activations(400, 128)
    recorded, others = activations[:200], activations[200:]

    def residual(result: low_rank.LowRankFit) -> float:
        return size((error - result.b @ result.a) @ others.T)

    assert residual(low_rank.fit(error, 16, recorded)) < 0.7 * residual(low_rank.fit(error, 16))


def test_the_same_input_gives_the_same_bytes_whatever_else_draws_random_numbers() -> None:
    error = quantization_error(128, 256)

    first = low_rank.fit(error, 16)
    state = torch.get_rng_state()
    second = low_rank.fit(error, 16)

    assert torch.equal(first.a, second.a)
    assert torch.equal(first.b, second.b)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_adapters_own_delta_is_kept_exactly() -> None:
    error = quantization_error(64, 128)
    a, b = torch.randn(8, 128).bfloat16(), torch.randn(64, 8).bfloat16()

    result = low_rank.fit_beside_delta(error, (a, b, 0.5), 32)

    correction = low_rank.fit(error, 24)
    expected = 0.5 * b.double() @ a.double() + correction.b.double() @ correction.a.double()
    assert (result.a.shape, result.b.shape) == ((32, 128), (64, 32))
    torch.testing.assert_close(result.b.double() @ result.a.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_rank_above_the_layers_own_leaves_nothing_of_the_difference() -> None:
    error = quantization_error(16, 64)

    result = low_rank.fit(error, 32)

    torch.testing.assert_close(result.b @ result.a, error, rtol=1e-4, atol=1e-6)
    assert result.residual < 1e-3
    assert (result.a.shape, result.b.shape) == ((32, 64), (16, 32))


def test_no_difference_takes_no_correction() -> None:
    result = low_rank.fit(torch.zeros(64, 64), 8)

    assert not result.a.any()
    assert not result.b.any()
    assert result.residual == 0


def test_a_and_b_are_of_one_size() -> None:
    result = low_rank.fit(quantization_error(128, 256), 16)

    torch.testing.assert_close(result.a.norm(dim=1), result.b.norm(dim=0), rtol=1e-3, atol=0)


@pytest.mark.parametrize(("rank", "least"), [(16, 32), (24, 8), (0, 8), (1024, 8), (512, 600)])
def test_a_rank_that_cannot_be_served_is_refused_with_those_that_can(rank: int, least: int) -> None:
    with pytest.raises(RouteRefused, match=f"Rank {rank} does not fit this adapter of rank {least}"):
        low_rank.require_rank(rank, least)
