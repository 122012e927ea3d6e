from __future__ import annotations

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from transformers import BitsAndBytesConfig

from convert.quantization.nf4 import Nf4
from convert.safetensors_io.tensors import DTYPES, TensorSpec

SHAPES = [(32, 64), (64, 128), (7, 10), (272, 64)]


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_stored_parts_are_exactly_those_planned(shape: tuple[int, int], double: bool) -> None:
    parts = Nf4(double).quantize("w", torch.randn(shape))
    names = {torch_name: name for name, (_, torch_name) in DTYPES.items()}

    stored = {
        TensorSpec(name, names[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape))
        for name, tensor in parts.items()
    }

    assert stored == set(Nf4(double).specs("w", shape))


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_dequantized_is_bit_equal_to_bitsandbytes(shape: tuple[int, int], double: bool) -> None:
    weight = torch.randn(shape).to(torch.bfloat16)
    codes, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=double)
    state.dtype = torch.float32

    assert torch.equal(Nf4(double).dequantize("w", Nf4(double).quantize("w", weight)), dequantize_4bit(codes, state))


def test_quantizing_in_float32_gives_the_codes_of_the_same_values_in_bfloat16() -> None:
    weight = torch.randn(64, 256).to(torch.bfloat16)

    half, full = Nf4().quantize("w", weight), Nf4().quantize("w", weight.float())

    assert half.keys() == full.keys()
    assert all(torch.equal(half[name], full[name]) for name in half)


@pytest.mark.parametrize("double", [True, False])
def test_the_configuration_is_that_of_transformers(double: bool) -> None:
    expected = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )

    assert Nf4(double).config() == expected.to_dict()
