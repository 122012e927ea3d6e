"""Trained biases are part of the function as trained, wherever PEFT saves them: the oracle is PEFT, unmerged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from convert.artifact import Artifact
from convert.errors import BaseMismatch, CheckpointUnsupported
from tests.convert import parts
from tests.convert.asking import Request, convert
from tests.convert.trained import save_trained

SOME = ["q_proj", "up_proj"]


def run(checkpoint: Path, base: Path, out: Path, **settings: Any) -> Artifact:
    return convert(Request(checkpoint=checkpoint, base=base, destination=out, **settings))


def as_trained(base: Path, adapter: Path, *, qlora: bool) -> torch.Tensor:
    model = parts.dequantized_model(base) if qlora else parts.load_float32(base)
    return parts.logits(parts.with_adapter(model, adapter))


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("qlora", [False, True], ids=["lora", "qlora"])
def test_trained_biases_are_in_the_merged_model(
    base_with_biases: Path, tmp_path: Path, out: Path, bias: str, qlora: bool
) -> None:
    adapter = save_trained(base_with_biases, tmp_path / "made", target_modules=SOME, bias=bias)
    (parts.mark_qlora if qlora else parts.mark_lora)(adapter)

    quality = run(adapter, base_with_biases, out, route="merge", quantize="none").manifest.quality

    expected = as_trained(base_with_biases, adapter, qlora=qlora)
    merged = parts.load_float32(out / "model")
    assert parts.divergence(expected, parts.logits(merged)) < 1e-4
    assert quality
    assert quality.kl_mean < 1e-4
    saved = load_file(adapter / "adapter_model.safetensors")
    biases = {name: tensor for name, tensor in saved.items() if name.endswith(".bias")}
    assert len(biases) == (14 if bias == "all" else 4)
    for name, tensor in biases.items():
        written = merged.state_dict()[name.removeprefix("base_model.model.").replace(".base_layer", "")]
        torch.testing.assert_close(written, tensor.to(torch.bfloat16).float(), rtol=0, atol=0)


@pytest.mark.parametrize("qlora", [False, True], ids=["lora", "qlora"])
def test_trained_biases_are_in_the_base_of_a_separate_adapter(
    base_with_biases: Path, tmp_path: Path, out: Path, qlora: bool
) -> None:
    adapter = save_trained(base_with_biases, tmp_path / "made", target_modules=SOME, bias="all")
    (parts.mark_qlora if qlora else parts.mark_lora)(adapter)

    artifact = run(adapter, base_with_biases, out, route="adapter", quantize="auto" if qlora else "none")

    written = (parts.load_stored if qlora else parts.load_float32)(out / "model")
    actual = parts.logits(parts.with_adapter(written, out / "adapter"))
    assert parts.divergence(as_trained(base_with_biases, adapter, qlora=qlora), actual) < 1e-4
    assert "mlp.down_proj.bias" in artifact.manifest.route.reason
    assert not [name for name in load_file(out / "adapter" / "adapter_model.safetensors") if "bias" in name]


def test_the_base_alone_is_measured_with_its_own_biases(base_with_biases: Path, tmp_path: Path, out: Path) -> None:
    """The oracle is transformers, on the directory of the base as it is."""
    text = "the rain in spain stays mainly in the plain"
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": text}) + "\n")
    perplexities = []
    for bias in ("all", "none"):
        adapter = parts.mark_lora(save_trained(base_with_biases, tmp_path / bias, target_modules=SOME, bias=bias))
        quality = run(adapter, base_with_biases, out / bias, route="merge", quantize="none", text=rows).manifest.quality
        assert quality
        perplexities.append(quality.perplexity_base)

    assert perplexities[0] == pytest.approx(perplexities[1], rel=1e-6)
    ids = torch.tensor([AutoTokenizer.from_pretrained(base_with_biases)(text)["input_ids"]])
    with torch.inference_mode():
        expected = parts.load_float32(base_with_biases)(ids, labels=ids).loss.exp()
    assert perplexities[0] == pytest.approx(float(expected), rel=1e-5)


def test_biases_that_were_trained_and_not_saved_are_refused(base_with_biases: Path, tmp_path: Path, out: Path) -> None:
    adapter = parts.mark_lora(save_trained(base_with_biases, tmp_path / "made", target_modules=SOME, bias="lora_only"))
    parts.edit_weights(
        adapter, lambda tensors: {name: t for name, t in tensors.items() if "0.mlp" not in name or "bias" not in name}
    )

    with pytest.raises(BaseMismatch, match=r"trained model\.layers\.0\.mlp\.up_proj\.bias and 0 more biases"):
        run(adapter, base_with_biases, out, route="merge", quantize="none", measure=False)


def test_a_copy_of_a_layer_must_be_the_weight_of_the_base(lora: Path, base: Path, tmp_path: Path, out: Path) -> None:
    weight = "model.layers.0.self_attn.q_proj.weight"
    copied = load_file(base / "model.safetensors")[weight]
    for number, tensor in enumerate([copied, copied.float(), copied * 1.01]):
        adapter = parts.copy(lora, tmp_path / f"made-{number}")
        name = f"base_model.model.{weight.replace('.weight', '.base_layer.weight')}"
        parts.edit_weights(adapter, lambda tensors, name=name, tensor=tensor: tensors | {name: tensor})

    run(tmp_path / "made-0", base, out / "same", route="merge", quantize="none", measure=False)
    run(tmp_path / "made-1", base, out / "wider", route="merge", quantize="none", measure=False)
    with pytest.raises(BaseMismatch, match=r"q_proj\.base_layer\.weight is not the base's"):
        run(tmp_path / "made-2", base, out / "other", route="merge", quantize="none", measure=False)


def test_a_bias_setting_that_peft_does_not_know_is_refused(lora: Path, base: Path, tmp_path: Path, out: Path) -> None:
    adapter = parts.copy(lora, tmp_path / "made")
    parts.edit_json(adapter / "adapter_config.json", bias="some")

    with pytest.raises(CheckpointUnsupported, match="bias='some': expected one of None, 'none', 'all', 'lora_only'"):
        run(adapter, base, out, route="merge", quantize="none", measure=False)
