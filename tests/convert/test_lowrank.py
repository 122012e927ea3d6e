"""Low-rank fits against the exact decompositions in float64: Eckart and Young say what the best is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from convert import lowrank
from convert.base_model import BaseModel
from convert.errors import RouteRefused
from convert.nf4 import Nf4
from convert.progress import silent
from tests.convert import parts


def quantization_error(rows: int, columns: int) -> torch.Tensor:
    torch.manual_seed(5)
    weight = torch.randn(rows, columns) * 0.05
    scheme = Nf4()
    return scheme.dequantize("w", scheme.quantize("w", weight)) - weight


def uneven_inputs(tokens: int, columns: int) -> torch.Tensor:
    """A few directions carry most of what a layer reads, as in real models."""
    torch.manual_seed(6)
    mixing = torch.linalg.qr(torch.randn(columns, columns)).Q * torch.logspace(0, -3, columns)
    return torch.randn(tokens, columns) @ mixing


def size(difference: torch.Tensor) -> float:
    return float(difference.double().norm())


@pytest.mark.parametrize("shape", [(256, 512), (512, 256), (64, 64)])
@pytest.mark.parametrize("rank", [8, 48])
def test_without_inputs_it_is_the_truncated_singular_value_decomposition(shape: tuple[int, int], rank: int) -> None:
    error = quantization_error(*shape)

    found = lowrank.fit(error, rank)

    left = size(error - found.b @ found.a)
    best = float(torch.linalg.svdvals(error.double())[rank:].square().sum().sqrt())
    assert best * (1 - 1e-5) <= left <= 1.005 * best
    assert found.residual == pytest.approx(left / size(error), rel=1e-3)


@pytest.mark.parametrize("tokens", [40, 400])
def test_with_inputs_it_keeps_outputs_as_well_as_any_matrix_of_its_rank_can(tokens: int) -> None:
    error, inputs = quantization_error(96, 128), uneven_inputs(tokens, 128)
    x = inputs.double()
    correlation = 0.9 * x.T @ x / tokens + 0.1 * torch.diag(x.square().mean(0))
    root = torch.linalg.cholesky(correlation)

    found = lowrank.fit(error, 16, inputs)

    left = size((error - found.b @ found.a).double() @ root)
    best = float(torch.linalg.svdvals(error.double() @ root)[16:].square().sum().sqrt())
    assert best * (1 - 1e-5) <= left <= 1.01 * best
    assert found.residual == pytest.approx(left / size(error.double() @ root), rel=1e-2)


def test_inputs_that_were_not_seen_gain_from_those_that_were() -> None:
    error, inputs = quantization_error(96, 128), uneven_inputs(400, 128)
    seen, unseen = inputs[:200], inputs[200:]

    def left(found: lowrank.Fit) -> float:
        return size((error - found.b @ found.a) @ unseen.T)

    assert left(lowrank.fit(error, 16, seen)) < 0.7 * left(lowrank.fit(error, 16))


def test_the_same_input_gives_the_same_bytes_whatever_else_draws_random_numbers() -> None:
    error = quantization_error(128, 256)

    first = lowrank.fit(error, 16)
    state = torch.get_rng_state()
    second = lowrank.fit(error, 16)

    assert torch.equal(first.a, second.a)
    assert torch.equal(first.b, second.b)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_adapters_own_delta_is_kept_exactly() -> None:
    error = quantization_error(64, 128)
    a, b = torch.randn(8, 128).bfloat16(), torch.randn(64, 8).bfloat16()

    found = lowrank.corrected(error, (a, b, 0.5), 32)

    rest = lowrank.fit(error, 24)
    expected = 0.5 * b.double() @ a.double() + rest.b.double() @ rest.a.double()
    assert (found.a.shape, found.b.shape) == ((32, 128), (64, 32))
    torch.testing.assert_close(found.b.double() @ found.a.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_rank_above_the_layers_own_leaves_nothing_of_the_difference() -> None:
    error = quantization_error(16, 64)

    found = lowrank.fit(error, 32)

    torch.testing.assert_close(found.b @ found.a, error, rtol=1e-4, atol=1e-6)
    assert found.residual < 1e-3
    assert (found.a.shape, found.b.shape) == ((32, 64), (16, 32))


def test_no_difference_takes_no_correction() -> None:
    found = lowrank.fit(torch.zeros(64, 64), 8)

    assert not found.a.any()
    assert not found.b.any()
    assert found.residual == 0


def test_both_halves_are_of_one_size() -> None:
    found = lowrank.fit(quantization_error(128, 256), 16)

    torch.testing.assert_close(found.a.norm(dim=1), found.b.norm(dim=0), rtol=1e-3, atol=0)


@pytest.mark.parametrize(("rank", "least"), [(16, 32), (24, 8), (0, 8), (1024, 8), (512, 600)])
def test_a_rank_that_cannot_be_served_is_refused_with_those_that_can(rank: int, least: int) -> None:
    with pytest.raises(RouteRefused, match=f"Rank {rank} can't carry this adapter of rank {least}"):
        lowrank.require_rank(rank, least)


def test_what_layers_read_is_recorded_once_for_those_that_read_the_same(base: Path) -> None:
    model = parts.load_float32(base)
    modules = list(BaseModel.open(base).linears)
    rows = [parts.PROMPT, parts.PROMPT.flip(1)[:, :5]]

    inputs = lowrank.record_inputs(model, modules, rows, silent)

    layer = "model.layers.1"
    with torch.inference_mode():
        states = model.model(rows[0], output_hidden_states=True).hidden_states[1]
        expected = model.get_submodule(f"{layer}.input_layernorm")(states)[0]
    read = inputs[f"{layer}.self_attn.q_proj"]
    assert read.shape == (12 + 5, 64)
    torch.testing.assert_close(read[:12].float(), expected, rtol=1e-2, atol=1e-2)
    assert inputs[f"{layer}.self_attn.k_proj"] is read
    assert inputs[f"{layer}.mlp.up_proj"] is inputs[f"{layer}.mlp.gate_proj"]
    assert inputs[f"{layer}.mlp.up_proj"] is not read
    assert inputs.keys() == set(modules)


def test_no_more_tokens_are_recorded_than_are_needed(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowrank, "MAX_TOKENS", 20)
    model = parts.load_float32(base)

    inputs = lowrank.record_inputs(model, list(BaseModel.open(base).linears), [parts.PROMPT] * 5, silent)

    assert {len(each) for each in inputs.values()} == {20}
    assert not any(module._forward_pre_hooks for module in model.modules())
