from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from convert.errors import BaseUnreadable
from convert.inputs.base_model import BaseModel
from convert.inputs.trainer_files import public_name
from convert.quantization.compressed import NAMES, Compressed, CompressedName, stored_shape
from convert.safetensors_io.shards import Shard, ShardWriter
from convert.safetensors_io.tensors import Tensors, TensorSpec
from tests.convert import parts


def rewrite(directory: Path, change: object) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)  # type: ignore[operator]
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def test_linear_layers_and_vocabulary_are_known(base: Path) -> None:
    opened = BaseModel.open(base)

    assert len(opened.linears) == 14
    assert opened.linears["model.layers.1.self_attn.k_proj"].shape == (32, 64)
    assert (opened.vocabulary, opened.is_tied, opened.quantization_name) == (parts.VOCABULARY, True, "none")
    assert {spec.name for spec in opened.other_specs} >= {"model.embed_tokens.weight", "model.norm.weight"}


def test_the_head_of_an_untied_model_is_a_linear_layer(untied_base: Path) -> None:
    assert BaseModel.open(untied_base).linears["lm_head"].is_head


@pytest.mark.parametrize("double", [True, False])
def test_a_base_stored_as_nf4_reads_as_bitsandbytes_dequantizes_it(base: Path, tmp_path: Path, double: bool) -> None:
    stored = BaseModel.open(parts.save_quantized(base, tmp_path / "nf4", double=double))
    oracle = dict(parts.dequantized_model(base, double=double).named_parameters())

    assert stored.quantization_name == ("nf4-double" if double else "nf4")
    for module, linear in stored.linears.items():
        assert torch.equal(stored.read(linear), oracle[f"{module}.weight"])


@pytest.mark.parametrize("double", [True, False])
def test_a_full_precision_base_is_taken_through_the_quantizer_of_training(base: Path, double: bool) -> None:
    from convert.quantization.nf4 import Nf4

    opened = BaseModel.open(base)
    oracle = dict(parts.dequantized_model(base, double=double).named_parameters())

    for module, linear in opened.linears.items():
        assert torch.equal(opened.read_as_trained(linear, Nf4(double)), oracle[f"{module}.weight"])


def test_an_incomplete_model_is_refused(base: Path, tmp_path: Path) -> None:
    copied = parts.copy(base, tmp_path / "copy")
    rewrite(copied, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))

    with pytest.raises(
        BaseUnreadable, match=r"incomplete model: 1 tensors are missing \(model\.layers\.1\.mlp\.up_proj"
    ):
        BaseModel.open(copied)


def test_another_structure_is_refused(base: Path, tmp_path: Path) -> None:
    copied = parts.copy(base, tmp_path / "copy")
    rewrite(copied, lambda tensors: tensors.update({"model.layers.0.mlp.experts.gate": torch.ones(2, 2)}))

    with pytest.raises(BaseUnreadable, match="not built like llama: 1 tensors have no place there"):
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


@pytest.mark.parametrize("name", NAMES)
def test_a_base_stored_by_compressed_tensors_reads_as_the_format_dequantizes_it(
    base: Path, untied_base: Path, tmp_path: Path, name: CompressedName
) -> None:
    for source in (base, untied_base):
        original = BaseModel.open(source)
        stored = BaseModel.open(parts.save_compressed(source, tmp_path / source.name, name))

        assert (stored.quantization_name, stored.is_quantized, stored.vocabulary) == (name, True, original.vocabulary)
        assert {spec.name for spec in stored.other_specs} == {spec.name for spec in original.other_specs}
        assert stored.linears.keys() == original.linears.keys()
        for module, linear in stored.linears.items():
            weight = original.read(original.linears[module])
            if not linear.is_head:
                quantizer = linear.quantization_format
                assert quantizer
                weight = quantizer.dequantize(module, quantizer.quantize(module, weight))
            assert torch.equal(stored.read(linear), weight), module


def compressed_copy(base: Path, directory: Path, name: CompressedName, change: object) -> Path:
    stored = parts.save_compressed(base, directory, name)
    rewrite(stored, change)
    return stored


UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("name", "part", "value"),
    [
        ("w8a8-int8", "weight", torch.ones(128, 64, dtype=torch.bfloat16)),
        ("w8a8-int8", "weight", torch.ones(0, 64, dtype=torch.int8)),
        ("w8a8-int8", "weight_scale", torch.ones(128, dtype=torch.bfloat16)),
        ("w8a8-int8", "weight_scale", torch.ones(127, 1, dtype=torch.bfloat16)),
        ("w8a8-int8", "weight_scale", torch.ones(128, 1, dtype=torch.float16)),
        ("w8a8-int8", "weight_scale", None),
        ("fp8-dynamic", "weight", torch.ones(128, 64, dtype=torch.int8)),
        ("w4a16", "weight_packed", torch.ones(128, 7, dtype=torch.int32)),
        ("w4a16", "weight_packed", torch.ones(128, 8, dtype=torch.int64)),
        ("w4a16", "weight_packed", None),
        ("w4a16", "weight_scale", torch.ones(128, 2, dtype=torch.bfloat16)),
        ("w4a16", "weight_scale", None),
        ("w4a16", "weight_shape", torch.tensor([128, 64, 1])),
        ("w4a16", "weight_shape", torch.tensor([128, 1 << 40])),
        ("w4a16", "weight_shape", torch.tensor([128, -64])),
        ("w4a16", "weight_shape", None),
    ],
)
def test_parts_of_wrong_size_are_refused_before_anything_is_computed(
    base: Path, tmp_path: Path, name: CompressedName, part: str, value: torch.Tensor | None
) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors.pop(f"{UP}.{part}")
        if value is not None:
            tensors[f"{UP}.{part}"] = value

    with pytest.raises(BaseUnreadable, match=r"up_proj|scales of|incomplete model"):
        BaseModel.open(compressed_copy(base, tmp_path / "copy", name, change))


def test_a_tensor_that_no_format_has_is_refused(base: Path, tmp_path: Path) -> None:
    """A zero point, for one, would be dropped and the weights read as others."""
    copied = compressed_copy(
        base, tmp_path / "copy", "w4a16", lambda tensors: tensors.update({f"{UP}.weight_zero_point": torch.ones(1)})
    )

    with pytest.raises(BaseUnreadable, match="weight_zero_point"):
        BaseModel.open(copied)


def test_a_quantized_head_is_refused(untied_base: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = torch.ones(parts.VOCABULARY, 64, dtype=torch.int8)

    with pytest.raises(BaseUnreadable, match=r"lm_head\.weight' is I8"):
        BaseModel.open(compressed_copy(untied_base, tmp_path / "copy", "w8a8-int8", change))


@pytest.mark.parametrize(
    ("group", "top"),
    [
        ({"weights": {"symmetric": False}}, {}),
        ({"weights": {"num_bits": 4}}, {}),
        ({"weights": {"strategy": "tensor"}}, {}),
        ({"weights": {"actorder": "group"}}, {}),
        ({"input_activations": {"dynamic": False}}, {}),
        ({"output_activations": {"num_bits": 8}}, {}),
        ({"targets": ["re:.*q_proj"]}, {}),
        ({}, {"ignore": ["model.layers.0.mlp.up_proj", "lm_head"]}),
        ({}, {"format": "marlin-24"}),
        ({}, {"format": ["int-quantized"]}),
        ({}, {"kv_cache_scheme": {"num_bits": 8}}),
        ({}, {"transform_config": {"config_groups": {"r1": {}}}}),
        ({}, {"config_groups": {"group_0": [], "group_1": []}}),
        ({}, {"config_groups": ["group_0"]}),
        ({}, {"config_groups": {"group_0": "W8A8"}}),
    ],
)
def test_another_use_of_compressed_tensors_is_refused(
    base: Path, tmp_path: Path, group: dict[str, object], top: dict[str, object]
) -> None:
    stored = parts.save_compressed(base, tmp_path / "stored", "w8a8-int8")
    quantization = Compressed("w8a8-int8").config()
    for name, value in group.items():
        known = quantization["config_groups"]["group_0"][name]
        quantization["config_groups"]["group_0"][name] = known | value if isinstance(known, dict) else value
    parts.edit_json(stored / "config.json", quantization_config=quantization | top)

    with pytest.raises(BaseUnreadable, match="in a way that is not read here"):
        BaseModel.open(stored)


def test_how_scales_and_codes_were_chosen_does_not_matter(base: Path, tmp_path: Path) -> None:
    stored = parts.save_compressed(base, tmp_path / "stored", "w4a16")
    quantization = BaseModel.open(stored).config["quantization_config"]
    quantization["config_groups"]["group_0"]["weights"] |= {"actorder": "static", "observer": "mse"}
    parts.edit_json(stored / "config.json", quantization_config=quantization | {"version": "0.19.0"})

    assert BaseModel.open(stored).quantization_format == Compressed("w4a16", "BF16", 64)


@given(
    st.dictionaries(
        st.sampled_from(["weight_packed", "weight_scale", "weight_shape", "weight"]),
        st.tuples(st.sampled_from(["I8", "I32", "I64", "BF16", "F8_E4M3"]), st.lists(st.integers(0, 9), max_size=3)),
    )
)
@settings(max_examples=150)
def test_hostile_headers_are_refused_or_are_sound(entries: dict[str, tuple[str, list[int]]]) -> None:
    """Whatever the sizes of a layer's parts: an error of ours, or a layer of exactly those sizes."""
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as directory:
        specs = [TensorSpec(f"{UP}.{part}", dtype, tuple(shape)) for part, (dtype, shape) in entries.items()]
        with ShardWriter(Path(directory), Shard("model.safetensors", tuple(specs))) as file:
            for spec in specs:
                file.append(spec.name, memoryview(bytes(spec.nbytes)))
        tensors = Tensors.open(Path(directory), "model", BaseUnreadable)
        for scheme in (Compressed("w8a8-int8"), Compressed("w4a16", group_size=32)):
            try:
                shape = stored_shape(Path(directory), tensors, UP, scheme)
            except BaseUnreadable:
                continue
            assert all(tensors.specs[spec.name] == spec for spec in scheme.specs(UP, shape))


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
