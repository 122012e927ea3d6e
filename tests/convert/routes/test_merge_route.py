"""Merged models against their oracles: PEFT's unmerged logits, a float64 merge, and transformers reading them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from convert.artifact import Artifact
from convert.errors import BaseUnreadable, FormatRefused
from tests.convert import parts
from tests.convert.asking import Request, convert
from tests.convert.trained import save_trained

MODEL_FILES = {
    "model/config.json",
    "model/generation_config.json",
    "model/model.safetensors",
    "model/tokenizer.json",
    "model/tokenizer_config.json",
    "model/chat_template.jinja",
}


def merged(checkpoint: Path, base: Path, out: Path, **settings: Any) -> Artifact:
    request = {"name": "tiny", "route": "merge", "quantize": "none", "measure": False, **settings}
    return convert(Request(checkpoint=checkpoint, base=base, destination=out, **request))


def float64_merge(weight: torch.Tensor, checkpoint: Path, module: str, scale: float) -> torch.Tensor:
    """The correctly rounded bfloat16 of weight + scale·B·A."""
    tensors = load_file(checkpoint / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{module}.lora_{half}.weight"].double() for half in "AB")
    return (weight.double() + scale * (b @ a)).to(torch.bfloat16)


def share_of_equal(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Share of equal elements; the others must be neighbours."""
    steps = (actual.view(torch.int16).int() - expected.view(torch.int16).int()).abs()
    assert int(steps.max()) <= 1
    return float((steps == 0).double().mean())


def test_a_qlora_merged_exactly_answers_as_trained(qlora: Path, base: Path, out: Path) -> None:
    artifact = merged(qlora, base, out)

    expected = parts.logits(parts.with_adapter(parts.dequantized_model(base), qlora))
    actual = parts.logits(parts.load_float32(out / "model"))
    assert parts.divergence(expected, actual) < 1e-4
    assert parts.divergence(expected, parts.logits(parts.load_float32(base))) > 0.1
    assert artifact.manifest.route.merged_onto == "dequantized"
    assert parts.tree(out) == MODEL_FILES | {"manifest.json"}


def test_an_adapter_of_the_embedding_alone_is_merged(base: Path, tmp_path: Path, out: Path) -> None:
    adapter = parts.mark_lora(save_trained(base, tmp_path / "made", target_modules=["embed_tokens"]))

    merged(adapter, base, out, dtype="float16")

    expected = parts.logits(parts.with_adapter(parts.load_float32(base), adapter))
    assert parts.divergence(expected, parts.logits(parts.load_float32(out / "model"))) < 1e-5


def test_float16_keeps_more_of_the_sum_than_bfloat16(qlora: Path, base: Path, tmp_path: Path) -> None:
    expected = parts.logits(parts.with_adapter(parts.dequantized_model(base), qlora))
    losses = {}
    for dtype in ("bfloat16", "float16"):
        merged(qlora, base, tmp_path / dtype, dtype=dtype)
        losses[dtype] = parts.divergence(expected, parts.logits(parts.load_float32(tmp_path / dtype / "model")))

    assert losses["float16"] < losses["bfloat16"] / 5
    stored = load_file(tmp_path / "float16" / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    assert json.loads((tmp_path / "float16" / "model" / "config.json").read_text())["dtype"] == "float16"


@pytest.mark.parametrize("weight", ["model.norm.weight", "model.layers.0.mlp.up_proj.weight"])
def test_weights_beyond_float16_are_refused_instead_of_becoming_infinite(
    qlora: Path, base: Path, tmp_path: Path, out: Path, weight: str
) -> None:
    large = parts.copy(base, tmp_path / "large")
    tensors = load_file(large / "model.safetensors")
    tensors[weight].view(-1)[0] = 1e5
    save_file(tensors, large / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(FormatRefused, match="--dtype bfloat16 holds larger weights"):
        merged(qlora, large, out, dtype="float16")


def test_a_base_with_a_weight_that_is_no_number_is_called_broken(
    qlora: Path, base: Path, tmp_path: Path, out: Path
) -> None:
    broken = parts.copy(base, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"].view(-1)[0] = math.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(BaseUnreadable, match=r"mlp\.up_proj.* holds NaN or infinity in the base"):
        merged(qlora, broken, out)


def test_a_lora_merged_in_16_bits_answers_as_trained(lora: Path, base: Path, out: Path) -> None:
    artifact = merged(lora, base, out)

    expected = parts.logits(parts.with_adapter(parts.load_float32(base), lora))
    assert parts.divergence(expected, parts.logits(parts.load_float32(out / "model"))) < 1e-4
    assert artifact.manifest.route.merged_onto == "original"


@pytest.mark.parametrize("training", ["lora", "qlora"])
def test_every_weight_is_the_correctly_rounded_float64_sum(
    lora: Path, qlora: Path, base: Path, out: Path, training: str
) -> None:
    checkpoint = qlora if training == "qlora" else lora
    model = parts.dequantized_model(base) if training == "qlora" else parts.load_float32(base)
    onto = {name: parameter.detach() for name, parameter in model.named_parameters()}

    merged(checkpoint, base, out)

    written = load_file(out / "model" / "model.safetensors")
    linears = [name for name in written if "_proj." in name]
    shares = [
        share_of_equal(written[name], float64_merge(onto[name], checkpoint, name.removesuffix(".weight"), 2.0))
        for name in linears
    ]
    assert len(linears) == 14
    assert sum(shares) / len(shares) > 0.9999


def test_what_the_adapter_leaves_alone_is_copied_byte_for_byte(lora: Path, base: Path, out: Path) -> None:
    merged(lora, base, out)

    before, after = load_file(base / "model.safetensors"), load_file(out / "model" / "model.safetensors")
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]) is ("_proj." not in name), name


def test_modules_the_adapter_does_not_target_keep_the_weights_of_training(
    base: Path, tmp_path: Path, out: Path
) -> None:
    partial = parts.mark_qlora(parts.save_adapter(base, tmp_path / "partial", target_modules=["q_proj"]))

    merged(partial, base, out)

    written = load_file(out / "model" / "model.safetensors")
    trained = dict(parts.dequantized_model(base).named_parameters())
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(written[name], trained[name].to(torch.bfloat16))


def test_an_nf4_base_and_its_original_give_the_same_merged_bytes(
    qlora: Path, base: Path, nf4_base: Path, tmp_path: Path
) -> None:
    for name, given in {"original": base, "stored": nf4_base}.items():
        merged(qlora, given, tmp_path / name)

    original, stored = (tmp_path / name / "model" / "model.safetensors" for name in ("original", "stored"))
    assert original.read_bytes() == stored.read_bytes()
    assert "quantization_config" not in json.loads((tmp_path / "stored/model/config.json").read_text())


def test_a_lora_is_merged_then_quantized(lora: Path, base: Path, tmp_path: Path, out: Path) -> None:
    artifact = merged(lora, base, out, quantize="nf4")

    assert artifact.manifest.route.name == "merge"
    assert artifact.manifest.model.quantization == "nf4-double"
    oracle = load_file(merged_with_peft_and_quantized(lora, base, tmp_path) / "model.safetensors")
    written = load_file(out / "model" / "model.safetensors")
    assert written.keys() == oracle.keys()
    for name, tensor in oracle.items():
        if name.endswith(".weight") and tensor.dtype == torch.uint8:
            # PEFT's sum is rounded to bfloat16 before it is quantized, ours is not: few codes differ.
            assert (tensor == written[name]).double().mean() > 0.97


def merged_with_peft_and_quantized(lora: Path, base: Path, folder: Path) -> Path:
    model = parts.with_adapter(parts.load_float32(base), lora).merge_and_unload()
    model.to(torch.bfloat16).save_pretrained(folder / "peft")
    return parts.save_quantized(folder / "peft", folder / "peft-nf4")


def test_quantized_output_is_read_by_transformers_as_it_was_written(lora: Path, base: Path, out: Path) -> None:
    from transformers import AutoModelForCausalLM

    from convert.inputs.base_model import BaseModel

    merged(lora, base, out, quantize="nf4")

    model = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.bfloat16)
    ours = BaseModel.open(out / "model")
    assert model.is_loaded_in_4bit
    for module, linear in ours.linears.items():
        parameter = model.get_submodule(module).weight
        parameter.quant_state.dtype = torch.float32
        from bitsandbytes.functional import dequantize_4bit

        assert torch.equal(dequantize_4bit(parameter.data, parameter.quant_state), ours.read(linear))


def test_the_head_is_merged_but_never_quantized(untied_base: Path, tmp_path: Path, out: Path) -> None:
    headed = parts.mark_lora(parts.save_adapter(untied_base, tmp_path / "headed", target_modules=["lm_head", "q_proj"]))

    merged(headed, untied_base, out, quantize="nf4")

    written = load_file(out / "model" / "model.safetensors")
    before = load_file(untied_base / "model.safetensors")["lm_head.weight"]
    assert written["lm_head.weight"].dtype == torch.bfloat16
    assert share_of_equal(written["lm_head.weight"], float64_merge(before, headed, "lm_head", 2.0)) > 0.9999


def test_the_head_of_a_qlora_was_in_full_precision_in_training_too(
    untied_base: Path, tmp_path: Path, out: Path
) -> None:
    headed = parts.mark_qlora(
        parts.save_adapter(untied_base, tmp_path / "headed", target_modules=["lm_head", "q_proj"])
    )

    quality = merged(headed, untied_base, out, measure=True).manifest.quality

    expected = parts.logits(parts.with_adapter(parts.dequantized_model(untied_base), headed))
    assert parts.divergence(expected, parts.logits(parts.load_float32(out / "model"))) < 1e-4
    assert quality
    assert quality.kl_mean < 1e-4


def test_tied_embeddings_stay_tied(lora: Path, base: Path, out: Path) -> None:
    merged(lora, base, out)

    assert "lm_head.weight" not in load_file(out / "model" / "model.safetensors")
    assert json.loads((out / "model" / "config.json").read_text())["tie_word_embeddings"] is True


def test_a_float32_base_is_written_in_16_bits(tmp_path: Path, out: Path) -> None:
    wide = parts.save_base(tmp_path / "wide", tied=False, dtype="float32")
    adapter = parts.mark_lora(parts.save_adapter(wide, tmp_path / "adapter"))

    merged(adapter, wide, out)

    written = load_file(out / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    config = json.loads((out / "model" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"


def test_rslora_and_patterns_are_merged_with_the_scale_of_each_module(base: Path, tmp_path: Path, out: Path) -> None:
    adapter = parts.mark_lora(
        parts.save_adapter(
            base, tmp_path / "adapter", use_rslora=True, rank_pattern={"q_proj": 4}, alpha_pattern={"up_proj": 3}
        )
    )

    merged(adapter, base, out)

    expected = parts.logits(parts.with_adapter(parts.load_float32(base), adapter))
    assert parts.divergence(expected, parts.logits(parts.load_float32(out / "model"))) < 1e-4


def test_large_models_are_written_in_shards_that_transformers_reads(lora: Path, base: Path, out: Path) -> None:
    whole = merged(lora, base, out.parent.parent / "whole", quantize="nf4")
    merged(lora, base, out, quantize="nf4", shard_bytes=40_000)

    assert "model/model.safetensors.index.json" in parts.tree(out)
    assert len(list((out / "model").glob("*.safetensors"))) > 2
    assert torch.equal(
        parts.logits(parts.load_float32(out / "model")), parts.logits(parts.load_float32(whole.root / "model"))
    )
