from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from convert.base_model import BaseModel, public_name
from convert.errors import BaseUnreadable
from tests.convert import parts


def rewrite(directory: Path, change: object) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)  # type: ignore[operator]
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def test_linear_layers_and_vocabulary_are_known(base: Path) -> None:
    opened = BaseModel.open(base)

    assert len(opened.linears) == 14
    assert opened.linears["model.layers.1.self_attn.k_proj"].shape == (32, 64)
    assert (opened.vocabulary, opened.is_tied, opened.quantization) == (parts.VOCABULARY, True, "none")
    assert {spec.name for spec in opened.others} >= {"model.embed_tokens.weight", "model.norm.weight"}


def test_the_head_of_an_untied_model_is_a_linear_layer(untied_base: Path) -> None:
    assert BaseModel.open(untied_base).linears["lm_head"].is_head


@pytest.mark.parametrize("double", [True, False])
def test_a_base_stored_as_nf4_reads_as_bitsandbytes_dequantizes_it(base: Path, tmp_path: Path, double: bool) -> None:
    stored = BaseModel.open(parts.save_quantized(base, tmp_path / "nf4", double=double))
    oracle = dict(parts.dequantized_model(base, double=double).named_parameters())

    assert stored.quantization == ("nf4-double" if double else "nf4")
    for module, linear in stored.linears.items():
        assert torch.equal(stored.read(linear), oracle[f"{module}.weight"])


@pytest.mark.parametrize("double", [True, False])
def test_a_full_precision_base_is_taken_through_the_quantizer_of_training(base: Path, double: bool) -> None:
    from convert.nf4 import Nf4

    opened = BaseModel.open(base)
    oracle = dict(parts.dequantized_model(base, double=double).named_parameters())

    for module, linear in opened.linears.items():
        assert torch.equal(opened.read_as_trained(linear, Nf4(double)), oracle[f"{module}.weight"])


def test_half_a_model_is_refused(base: Path, tmp_path: Path) -> None:
    copied = parts.copy(base, tmp_path / "copy")
    rewrite(copied, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))

    with pytest.raises(BaseUnreadable, match=r"half a model: 1 tensors are missing \(model\.layers\.1\.mlp\.up_proj"):
        BaseModel.open(copied)


def test_another_structure_is_refused(base: Path, tmp_path: Path) -> None:
    copied = parts.copy(base, tmp_path / "copy")
    rewrite(copied, lambda tensors: tensors.update({"model.layers.0.mlp.experts.gate": torch.ones(2, 2)}))

    with pytest.raises(BaseUnreadable, match="not built like Llama"):
        BaseModel.open(copied)


@pytest.mark.parametrize(
    ("quantization", "says"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "fp4"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "8-bit"),
    ],
    ids=["gptq", "fp4", "8-bit"],
)
def test_a_base_of_another_quantizer_is_refused(base: Path, tmp_path: Path, quantization: object, says: str) -> None:
    copied = parts.copy(base, tmp_path / "copy")
    parts.edit_json(copied / "config.json", quantization_config=quantization)

    with pytest.raises(BaseUnreadable, match=says):
        BaseModel.open(copied)


@pytest.mark.parametrize(
    "part",
    ["absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__nf4", None],
)
def test_nf4_parts_of_wrong_size_never_reach_the_native_code(nf4_base: Path, tmp_path: Path, part: str | None) -> None:
    copied = parts.copy(nf4_base, tmp_path / "copy")
    name = "model.layers.0.mlp.up_proj.weight" + (f".{part}" if part else "")
    rewrite(copied, lambda tensors: tensors.update({name: tensors[name][:-1].clone()}))

    with pytest.raises(BaseUnreadable, match=r"up_proj\.weight"):
        BaseModel.open(copied)


def test_a_hub_id_given_as_base_is_answered_with_how_to_download_it() -> None:
    with pytest.raises(BaseUnreadable, match="hf download acme/tiny --local-dir"):
        BaseModel.open(Path("acme/tiny"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("acme/tiny-llama", "acme/tiny-llama"),
        ("/home/someone/models/tiny", "tiny"),
        ("../models/tiny", "tiny"),
        ("/cache/models--acme--tiny-llama/snapshots/abc", "acme/tiny-llama"),
    ],
)
def test_names_of_bases_do_not_leak_paths(name: str, expected: str) -> None:
    assert public_name(name) == expected
