"""Three formats of compressed-tensors, compared with the library's own functions and with float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import quantize
from transformers import AutoModelForCausalLM

from convert.errors import FormatRefused
from convert.inputs.adapter_checkpoint import Checkpoint
from convert.inputs.base_model import BaseModel
from convert.plan.conversion_plan import OutputFormat, plan_model
from convert.progress import silent
from convert.quantization.compressed import NAMES, Compressed, CompressedName
from convert.safetensors_io.tensors import DTYPES, TensorSpec
from convert.write.model import write_model
from tests.convert import parts

PRESETS = {"w8a8-int8": "W8A8", "fp8-dynamic": "FP8_DYNAMIC", "w4a16": "W4A16"}
# Half a step of the grid, as a share of the largest magnitude that has a scale: 1/255, 1/15; float8 has 4 bits.
HALF_STEP = {"w8a8-int8": 1 / 255, "fp8-dynamic": 2**-4, "w4a16": 1 / 15}
SHAPES = [(32, 64), (64, 128), (8, 96), (272, 64)]


def scheme(name: CompressedName, columns: int, dtype: str = "BF16") -> Compressed:
    return Compressed.fitting(name, [columns], dtype)


def preset(name: CompressedName, group_size: int | None = None) -> Any:
    """The library's own idea of the scheme."""
    known = preset_name_to_scheme(PRESETS[name], ["Linear"])
    if group_size:
        known.weights = QuantizationArgs(**known.weights.model_dump() | {"group_size": group_size})
    return known


def gaussian(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_stored_parts_are_exactly_those_planned(name: CompressedName, shape: tuple[int, int], dtype: str) -> None:
    settings = scheme(name, shape[1], dtype)
    names = {torch_name: header for header, (_, torch_name) in DTYPES.items()}

    stored = {
        TensorSpec(part, names[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape))
        for part, tensor in settings.quantize("w", gaussian(shape)).items()
    }

    assert stored == set(settings.specs("w", shape))


@pytest.mark.parametrize("name", NAMES)
def test_codes_are_those_the_library_finds_for_the_weight_and_the_scale(name: CompressedName) -> None:
    weight = gaussian((64, 128))
    settings = scheme(name, 128)
    stored = settings.quantize("w", weight)
    known = preset(name, settings.group_size)
    dtype = torch.float8_e4m3fn if name == "fp8-dynamic" else torch.int8

    expected = quantize(weight, stored["w.weight_scale"].float(), None, known.weights, dtype=dtype).float()

    scale = stored["w.weight_scale"].float().repeat_interleave(settings.group_size or 128, dim=1)
    assert torch.equal(settings.dequantize("w", stored), expected * scale)


@pytest.mark.parametrize("name", NAMES)
def test_scales_of_a_16_bit_weight_are_those_of_llm_compressor(name: CompressedName) -> None:
    """Which takes the largest magnitude of a row or group, in the weight's own type, over largest_code the range."""
    weight = gaussian((64, 128), torch.bfloat16)
    settings = scheme(name, 128)
    size = settings.group_size or 128
    largest_code = {"w8a8-int8": 127.5, "fp8-dynamic": 448.0, "w4a16": 7.5}[name]

    expected = weight.unflatten(1, (-1, size)).abs().amax(-1) / largest_code

    assert torch.equal(settings.quantize("w", weight)["w.weight_scale"], expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_dequantized_is_what_the_library_decompresses(name: CompressedName, shape: tuple[int, int]) -> None:
    settings = scheme(name, shape[1])
    stored = settings.quantize("w", gaussian(shape))
    local = {part.removeprefix("w."): tensor for part, tensor in stored.items()}
    compressor = BaseCompressor.get_value_from_registry(settings.config()["format"])

    decompressed = compressor.decompress(local, preset(name, settings.group_size))["weight"]

    # It rounds the product to the scale's type, bfloat16; ours is float32.
    assert decompressed.dtype == torch.bfloat16
    assert torch.equal(settings.dequantize("w", stored).to(torch.bfloat16), decompressed)


@pytest.mark.parametrize("name", NAMES)
def test_the_error_is_no_more_than_half_a_step_of_the_grid(name: CompressedName) -> None:
    weight = gaussian((64, 256)).double()
    settings = scheme(name, 256)
    size = settings.group_size or 256

    error = (settings.dequantize("w", settings.quantize("w", weight.float())).double() - weight).abs()

    largest = weight.unflatten(1, (-1, size)).abs().amax(-1).repeat_interleave(size, dim=1)
    # 0.5 % more for the scale, which is rounded to 8 bits, and the largest magnitude, cut off by that.
    relative = weight.abs() if name == "fp8-dynamic" else largest
    assert (error <= relative * (HALF_STEP[name] + 0.005) + largest * 2e-6).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("size", [0.0, 1e-9, 1e4])
def test_rows_of_zeros_or_of_extreme_size_stay_finite(name: CompressedName, dtype: str, size: float) -> None:
    weight = gaussian((32, 128))
    weight[3] *= size
    weight[3, 0] = 0
    settings = scheme(name, 128, dtype)

    dequantized = settings.dequantize("w", settings.quantize("w", weight))

    assert dequantized.isfinite().all()
    assert (dequantized[3] - weight[3]).abs().max() <= max(weight[3].abs().max() * 0.08, 1e-8)


def test_weights_too_large_for_a_scale_are_refused() -> None:
    with pytest.raises(FormatRefused, match=r"w: weights up to 1e\+10 have no scale in torch\.float16"):
        scheme("w4a16", 32, "F16").quantize("w", torch.full((2, 32), 1e10))


@pytest.mark.parametrize("name", NAMES)
def test_float32_is_quantized_as_it_is(name: CompressedName) -> None:
    """A rounding to 16 bits first would move values that lie near the middle between two codes."""
    weight = gaussian((256, 256))
    settings = scheme(name, 256)
    once = settings.dequantize("w", settings.quantize("w", weight))
    twice = settings.dequantize("w", settings.quantize("w", weight.to(torch.bfloat16)))

    assert (once - weight).norm() < (twice - weight).norm()


@pytest.mark.parametrize(("widths", "size"), [([256, 512], 128), ([576, 1536], 64), ([96, 128], 32)])
def test_w4a16_takes_the_largest_group_that_divides_every_layer(widths: list[int], size: int) -> None:
    assert Compressed.fitting("w4a16", widths).group_size == size


def test_w4a16_is_refused_where_no_group_divides_a_layer() -> None:
    with pytest.raises(FormatRefused, match=r"input width 100, 120\. Take w8a8-int8"):
        Compressed.fitting("w4a16", [120, 128, 100])


@pytest.mark.parametrize("name", NAMES)
def test_the_configuration_is_that_of_the_library(name: CompressedName) -> None:
    """As `ModelCompressor.update_config` writes it beside a model that llm-compressor quantized."""
    import compressed_tensors

    settings = scheme(name, 128)
    known = preset(name, settings.group_size)
    known.format = settings.config()["format"]
    library = QuantizationConfig(
        config_groups={"group_0": known}, quantization_status="compressed", format=known.format, ignore=["lm_head"]
    )

    expected = library.model_dump(mode="json") | {"sparsity_config": {}, "transform_config": {}}
    assert settings.config() == expected | {"version": compressed_tensors.__version__}


@pytest.mark.parametrize("name", NAMES)
def test_a_written_model_is_the_one_transformers_loads(name: CompressedName, base: Path, tmp_path: Path) -> None:
    written = parts.save_compressed(base, tmp_path / name, name)
    opened = BaseModel.open(written)

    loaded = AutoModelForCausalLM.from_pretrained(written, dtype=torch.bfloat16).eval()
    parts.logits(loaded)  # decompresses

    assert opened.quantization_name == name
    for module, linear in opened.linears.items():
        weight = loaded.get_submodule(module).weight
        assert torch.equal(weight.detach(), opened.read(linear).to(torch.bfloat16)), module


@pytest.mark.parametrize("name", NAMES)
def test_a_merged_model_is_quantized_from_the_exact_sum(
    name: CompressedName, base: Path, lora: Path, tmp_path: Path
) -> None:
    """The delta is added in float32 and the sum goes to the quantizer without a rounding between."""
    opened, checkpoint = BaseModel.open(base), Checkpoint.open(lora)
    settings = scheme(name, 64)
    plan = plan_model(opened, OutputFormat("original", settings), checkpoint)
    (tmp_path / "model").mkdir()

    write_model(tmp_path / "model", plan, opened, checkpoint, silent)

    written = BaseModel.open(tmp_path / "model")
    assert written.config["quantization_config"] == settings.config()
    assert {spec for step in plan.steps for spec in step.outputs} == set(written.tensors.specs.values())
    for module, weights in checkpoint.lora_weights.items():
        a, b = checkpoint.read(weights)
        exact = opened.read(opened.linears[module]).double() + weights.scaling * (b.double() @ a.double())
        oracle = settings.quantize(module, exact.float())
        stored = {part: written.tensors.read(part) for part in oracle}
        # Where float32 sums differ in their last bit a code on the edge may go either way.
        same = [(stored[part].float() == oracle[part].float()).float().mean() for part in oracle]
        assert min(same) > 0.998, module


def test_a_model_is_written_the_same_twice(base: Path, tmp_path: Path) -> None:
    first, second = (parts.save_compressed(base, tmp_path / name, "w4a16") for name in ("one", "two"))

    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
