"""What is left of a delta in written weights; and why a 4-bit merge of a QLoRA adapter is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file

from convert.base_model import BaseModel
from convert.checkpoint import Checkpoint
from convert.nf4 import Nf4
from convert.plan import Form, plan_model
from convert.progress import silent
from convert.quality import Retained, TensorRetention, retention, tensor_retention
from convert.routes.model import write_model
from tests.convert import parts


def there_and_back(weight: torch.Tensor, scheme: Nf4) -> torch.Tensor:
    return scheme.dequantize("w", scheme.quantize("w", weight))


def merged(checkpoint: Path, base: Path, out: Path, form: Form) -> Retained:
    """Written in the form, then compared with what went in."""
    opened, source = BaseModel.open(base), Checkpoint.open(checkpoint)
    out.mkdir()
    write_model(out, plan_model(opened, form, source), opened, source, silent)
    found = retention(source, opened, form.quantizer, out, silent)
    assert found
    return found


def test_the_figures_are_the_projection_and_the_signs_computed_by_numpy() -> None:
    generator = torch.Generator().manual_seed(5)
    before, delta, noise = (torch.randn(700, 48, generator=generator) for _ in range(3))
    delta[3] = 0
    written = before + 0.4 * delta + 0.3 * noise

    found = tensor_retention("m", written, before, delta)

    change, d = (numpy.float64(one.numpy()) for one in (written - before, delta))
    moved = d != 0
    assert found.retention == pytest.approx(numpy.vdot(change, d) / numpy.vdot(d, d), rel=1e-6)
    assert found.signs == pytest.approx((numpy.sign(change) == numpy.sign(d))[moved].mean(), abs=1e-4)
    assert 0.3 < found.retention < 0.5


def test_a_weight_that_was_never_changed_keeps_nothing_and_an_exact_sum_all() -> None:
    before, delta = torch.randn(64, 32), torch.randn(64, 32)

    assert tensor_retention("m", before, before, delta) == TensorRetention("m", 0.0, 0.0)
    assert tensor_retention("m", before + delta, before, delta).retention == pytest.approx(1, abs=1e-6)
    assert tensor_retention("m", before - delta, before, delta).retention == pytest.approx(-1, abs=1e-6)


def test_the_same_4_bit_grid_rounds_the_delta_away_and_16_bits_keep_it() -> None:
    torch.manual_seed(3)
    dequantized = there_and_back(torch.randn(256, 256) * 0.05, Nf4())
    delta = (torch.randn(256, 8) @ torch.randn(8, 256)) * 0.05 * 0.01 / 8**0.5  # 1 % of the weights

    same_grid = there_and_back(dequantized + delta, Nf4(double=False))
    in_16_bits = (dequantized + delta).to(torch.bfloat16).float()

    assert tensor_retention("m", same_grid, dequantized, delta).retention < 0.1
    assert tensor_retention("m", in_16_bits, dequantized, delta).retention > 0.95


@pytest.mark.parametrize(
    "form",
    [
        Form("dequantized", None, Nf4()),
        Form("original", None),
        Form("original", Nf4()),
        Form("original", None, dtype="F16"),
    ],
    ids=["exact", "original", "original-nf4", "float16"],
)
def test_every_form_of_a_merged_model_keeps_a_delta_as_large_as_its_steps(
    lora: Path, base: Path, tmp_path: Path, form: Form
) -> None:
    found = merged(lora, base, tmp_path / "model", form)

    assert len(found.tensors) == 14
    assert found.summary.mean == pytest.approx(1, abs=0.05)
    assert found.summary.least == min(tensor.retention for tensor in found.tensors)
    assert found.summary.least_module in {tensor.module for tensor in found.tensors if tensor.signs > 0.5}


def test_a_small_delta_is_lost_on_the_same_grid_and_kept_in_float16(base: Path, tmp_path: Path) -> None:
    faint = parts.save_adapter(base, tmp_path / "faint", strength=0.004)

    lost = merged(faint, base, tmp_path / "same-grid", Form("dequantized", Nf4(), Nf4()))
    kept = merged(faint, base, tmp_path / "float16", Form("dequantized", None, Nf4(), dtype="F16"))

    assert lost.summary.mean < 0.5 < 0.95 < kept.summary.mean


def test_a_module_whose_delta_is_zero_is_not_asked(lora: Path, base: Path, tmp_path: Path) -> None:
    def without_first_layer(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            name: tensor * 0 if "layers.0." in name and "lora_B" in name else tensor for name, tensor in tensors.items()
        }

    copied = parts.copy(lora, tmp_path / "copy")
    parts.edit_weights(copied, without_first_layer)

    found = merged(copied, base, tmp_path / "model", Form("original", None))

    assert {tensor.module.split(".")[2] for tensor in found.tensors} == {"1"}


def test_one_module_that_was_left_out_is_the_least(lora: Path, base: Path, tmp_path: Path) -> None:
    merged(lora, base, tmp_path / "model", Form("original", None))
    lost = "model.layers.1.mlp.up_proj"
    path = tmp_path / "model" / "model.safetensors"
    tensors: dict[str, Any] = load_file(path)
    tensors[f"{lost}.weight"] = load_file(base / "model.safetensors")[f"{lost}.weight"]
    parts.save_file(tensors, path)

    found = retention(Checkpoint.open(lora), BaseModel.open(base), None, tmp_path / "model", silent)

    assert found
    assert (found.summary.least, found.summary.least_module) == (0.0, lost)
    assert found.summary.mean == pytest.approx(13 / 14, abs=0.02)
