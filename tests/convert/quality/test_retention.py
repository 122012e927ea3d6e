"""What is left of a delta in written weights; and why a 4-bit merge of a QLoRA adapter is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file

from convert.inputs.adapter_checkpoint import Checkpoint
from convert.inputs.base_model import BaseModel
from convert.plan.conversion_plan import OutputFormat, plan_model
from convert.progress import silent
from convert.quality import ModelRetention, measure_retention
from convert.quality.retention import TensorRetention, tensor_retention
from convert.quantization.nf4 import Nf4
from convert.write.model import write_model
from tests.convert import parts


def quantized_and_back(weight: torch.Tensor, quantizer: Nf4) -> torch.Tensor:
    return quantizer.dequantize("w", quantizer.quantize("w", weight))


def merged(checkpoint: Path, base: Path, out: Path, output_format: OutputFormat) -> ModelRetention:
    """The retention of a merged model that is written in this format."""
    opened, source = BaseModel.open(base), Checkpoint.open(checkpoint)
    out.mkdir()
    write_model(out, plan_model(opened, output_format, source), opened, source, silent)
    retention = measure_retention(source, opened, output_format.quantizer, out, silent)
    assert retention
    return retention


def test_the_figures_are_the_projection_and_the_signs_computed_by_numpy() -> None:
    generator = torch.Generator().manual_seed(5)
    before, delta, noise = (torch.randn(700, 48, generator=generator) for _ in range(3))
    delta[3] = 0
    written = before + 0.4 * delta + 0.3 * noise

    result = tensor_retention("m", written, before, delta)

    change, d = (numpy.float64(matrix.numpy()) for matrix in (written - before, delta))
    moved = d != 0
    assert result.retention == pytest.approx(numpy.vdot(change, d) / numpy.vdot(d, d), rel=1e-6)
    assert result.signs == pytest.approx((numpy.sign(change) == numpy.sign(d))[moved].mean(), abs=1e-4)
    assert 0.3 < result.retention < 0.5


def test_a_weight_that_was_never_changed_keeps_nothing_and_an_exact_sum_all() -> None:
    before, delta = torch.randn(64, 32), torch.randn(64, 32)

    assert tensor_retention("m", before, before, delta) == TensorRetention("m", 0.0, 0.0)
    assert tensor_retention("m", before + delta, before, delta).retention == pytest.approx(1, abs=1e-6)
    assert tensor_retention("m", before - delta, before, delta).retention == pytest.approx(-1, abs=1e-6)


def test_the_same_4_bit_grid_rounds_the_delta_away_and_16_bits_keep_it() -> None:
    torch.manual_seed(3)
    dequantized = quantized_and_back(torch.randn(256, 256) * 0.05, Nf4())
    delta = (torch.randn(256, 8) @ torch.randn(8, 256)) * 0.05 * 0.01 / 8**0.5  # 1 % of the weights

    same_grid = quantized_and_back(dequantized + delta, Nf4(double=False))
    in_16_bits = (dequantized + delta).to(torch.bfloat16).float()

    assert tensor_retention("m", same_grid, dequantized, delta).retention < 0.1
    assert tensor_retention("m", in_16_bits, dequantized, delta).retention > 0.95


@pytest.mark.parametrize(
    "output_format",
    [
        OutputFormat("dequantized", None, Nf4()),
        OutputFormat("original", None),
        OutputFormat("original", Nf4()),
        OutputFormat("original", None, dtype="F16"),
    ],
    ids=["exact", "original", "original-nf4", "float16"],
)
def test_every_format_of_a_merged_model_keeps_a_delta_as_large_as_its_steps(
    lora: Path, base: Path, tmp_path: Path, output_format: OutputFormat
) -> None:
    retention = merged(lora, base, tmp_path / "model", output_format)

    assert len(retention.tensors) == 14
    assert retention.summary.mean == pytest.approx(1, abs=0.05)
    assert retention.summary.least == min(tensor.retention for tensor in retention.tensors)
    assert retention.summary.least_module in {tensor.module for tensor in retention.tensors if tensor.signs > 0.5}


def test_a_small_delta_is_lost_on_the_same_grid_and_kept_in_float16(base: Path, tmp_path: Path) -> None:
    faint = parts.save_adapter(base, tmp_path / "faint", strength=0.004)

    lost = merged(faint, base, tmp_path / "same-grid", OutputFormat("dequantized", Nf4(), Nf4()))
    kept = merged(faint, base, tmp_path / "float16", OutputFormat("dequantized", None, Nf4(), dtype="F16"))

    assert lost.summary.mean < 0.5 < 0.95 < kept.summary.mean


def test_a_module_whose_delta_is_zero_is_not_measured(lora: Path, base: Path, tmp_path: Path) -> None:
    def without_first_layer(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            name: tensor * 0 if "layers.0." in name and "lora_B" in name else tensor for name, tensor in tensors.items()
        }

    copied = parts.copy(lora, tmp_path / "copy")
    parts.edit_weights(copied, without_first_layer)

    retention = merged(copied, base, tmp_path / "model", OutputFormat("original", None))

    assert {tensor.module.split(".")[2] for tensor in retention.tensors} == {"1"}


def test_one_module_that_was_left_out_is_the_least(lora: Path, base: Path, tmp_path: Path) -> None:
    merged(lora, base, tmp_path / "model", OutputFormat("original", None))
    lost = "model.layers.1.mlp.up_proj"
    path = tmp_path / "model" / "model.safetensors"
    tensors: dict[str, Any] = load_file(path)
    tensors[f"{lost}.weight"] = load_file(base / "model.safetensors")[f"{lost}.weight"]
    parts.save_file(tensors, path)

    retention = measure_retention(Checkpoint.open(lora), BaseModel.open(base), None, tmp_path / "model", silent)

    assert retention
    assert (retention.summary.least, retention.summary.least_module) == (0.0, lost)
    assert retention.summary.mean == pytest.approx(13 / 14, abs=0.02)
