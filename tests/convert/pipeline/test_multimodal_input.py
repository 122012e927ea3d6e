"""Adapters and bases of multimodal models in every form that trainers and publishers give them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from convert.errors import BaseUnreadable, CheckpointUnsupported, RouteRefused
from convert.inputs.keys import parse
from convert.pipeline.convert import Destination
from convert.pipeline.convert import convert as run
from convert.pipeline.inspect import inspect
from convert.progress import silent
from tests.convert import families, parts
from tests.convert.asking import Request, convert

PROMPT = torch.arange(2, 42)[None]


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base with a tied head, and an adapter."""
    return families.save_tuned("gemma3", tmp_path_factory.mktemp("gemma"))


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def test_lora_of_a_vision_tower_that_learnt_nothing_is_left_out(
    gemma: tuple[Path, Path], tmp_path: Path, out: Path
) -> None:
    base, _ = gemma
    adapter = families.save_adapter(base, tmp_path / "both", target_modules=["q_proj", "v_proj"], exclude_modules=None)
    with_vision = load_file(adapter / "adapter_model.safetensors")
    for name, tensor in with_vision.items():
        if not families.is_language(name.removeprefix("base_model.model.")) and "lora_B" in name:
            tensor.zero_()
    save_file(with_vision, adapter / "adapter_model.safetensors")

    artifact = convert(Request(adapter, base, out, route="adapter", quantize="none"))

    vision = [name for name in with_vision if not families.is_language(name.removeprefix("base_model.model."))]
    assert len(vision) == 4
    kept = load_file(out / "adapter" / "adapter_model.safetensors")
    assert kept.keys() == with_vision.keys() - {*vision}
    assert any("2 modules outside of the language model" in note for note in artifact.manifest.notes)
    expected = parts.logits(families.as_trained(base, adapter), PROMPT)
    torch.testing.assert_close(
        parts.logits(families.as_trained(out / "model", out / "adapter"), PROMPT), expected, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj"], "exclude_modules": None},
        {"modules_to_save": ["mm_soft_emb_norm"]},
    ],
    ids=["by LoRA", "as a whole"],
)
def test_an_adapter_that_changes_more_than_the_language_model_is_refused(
    gemma: tuple[Path, Path], tmp_path: Path, out: Path, settings: dict[str, Any]
) -> None:
    base, _ = gemma
    adapter = families.save_adapter(base, tmp_path / "both", **settings)

    with pytest.raises(CheckpointUnsupported, match=r"(vision_tower|multi_modal_projector).* outside of the language"):
        convert(Request(adapter, base, out, route="merge", quantize="none"))


@pytest.mark.parametrize(
    "trained_as",
    ["base_model.model.model.", "base_model.model.language_model.model.", "base_model.model."],
    ids=["text model", "older transformers", "language model without head"],
)
@pytest.mark.parametrize("route", ["merge", "adapter"])
def test_an_adapter_with_other_names_of_the_language_model_is_the_same_adapter(
    gemma: tuple[Path, Path], tmp_path: Path, out: Path, trained_as: str, route: Any
) -> None:
    base, adapter = gemma
    other = parts.copy(adapter, tmp_path / "other")
    families.renamed(other, {"base_model.model.model.language_model.": trained_as}, "adapter_model.safetensors")

    convert(Request(other, base, out, route=route, quantize="none"))
    convert(Request(adapter, base, tmp_path / "expected", route=route, quantize="none"))

    files = ("model/model.safetensors", *(["adapter/adapter_model.safetensors"] if route == "adapter" else []))
    for file in files:
        assert (out / file).read_bytes() == (tmp_path / "expected" / file).read_bytes()


@pytest.mark.parametrize(
    "path",
    ["model.language_model.layers.0.mlp.up_proj", "language_model.model.layers.0.mlp.up_proj"],
    ids=["newer", "older"],
)
def test_the_names_of_either_transformers_are_those_of_the_model_without_a_warning(path: str) -> None:
    key = parse(f"base_model.model.{path}.lora_A.weight")

    assert key
    assert key.module == "model.language_model.layers.0.mlp.up_proj"
    assert not key.is_corrected


def test_a_tied_head_with_its_own_delta_is_untied_in_the_whole_model(
    gemma: tuple[Path, Path], tmp_path: Path, out: Path
) -> None:
    base, _ = gemma
    adapter = families.save_adapter(base, tmp_path / "headed", target_modules=["lm_head", "q_proj"])

    convert(Request(adapter, base, out, route="merge", quantize="none"))

    config = json.loads((out / "model" / "config.json").read_text())
    assert config["tie_word_embeddings"] is config["text_config"]["tie_word_embeddings"] is False
    assert "language_model.lm_head.weight" in weights_of(out / "model")
    expected, actual = families.as_trained(base, adapter), families.load(out / "model")
    assert parts.divergence(parts.logits(expected, PROMPT), parts.logits(actual, PROMPT)) < 1e-3


def test_a_resized_vocabulary_is_that_of_the_language_model(
    gemma: tuple[Path, Path], tmp_path: Path, out: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    base, _ = gemma
    model = families.load(base)
    model.resize_token_embeddings(parts.VOCABULARY + 3)
    settings = {"target_modules": ["o_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    adapted = get_peft_model(model, LoraConfig(r=4, **settings))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    adapted.save_pretrained(tmp_path / "adapter")
    parts.mark_lora(tmp_path / "adapter")

    convert(Request(tmp_path / "adapter", base, out, route="merge", quantize="none"))

    config = json.loads((out / "model" / "config.json").read_text())
    assert config["text_config"]["vocab_size"] == parts.VOCABULARY + 3
    assert parts.divergence(parts.logits(adapted, PROMPT), parts.logits(families.load(out / "model"), PROMPT)) < 1e-3


def test_a_head_of_its_own_counts_where_config_json_says_that_it_is_tied(tmp_path: Path, out: Path) -> None:
    base, adapter = families.save_tuned("mistral3", tmp_path)
    parts.edit_json(base / "config.json", tie_word_embeddings=...)  # transformers' default is true, vLLM reads another

    convert(Request(adapter, base, out, route="merge", quantize="none"))

    trained = families.as_trained(base, adapter)
    assert not torch.equal(trained.get_output_embeddings().weight, trained.get_input_embeddings().weight)
    assert json.loads((out / "model" / "config.json").read_text())["tie_word_embeddings"] is False
    merged = families.load(out / "model")
    assert parts.divergence(parts.logits(trained, PROMPT), parts.logits(merged, PROMPT)) < 1e-3


def test_settings_at_the_top_of_config_json_are_those_of_the_language_model(tmp_path: Path, out: Path) -> None:
    base, adapter = families.save_tuned("qwen2_5_vl", tmp_path)
    nested = json.loads((base / "config.json").read_text())["text_config"]
    parts.edit_json(base / "config.json", **nested | {"text_config": ..., "model_type": "qwen2_5_vl"})

    artifact = convert(Request(adapter, base, out, route="merge", quantize="none"))

    assert artifact.manifest.quality
    assert artifact.manifest.quality.kl_mean < artifact.manifest.quality.kl_base / 100
    merged = families.load(out / "model")
    assert (
        parts.divergence(parts.logits(families.as_trained(base, adapter), PROMPT), parts.logits(merged, PROMPT)) < 1e-3
    )


def test_a_base_with_a_quantized_vision_tower_is_kept_or_refused(
    gemma: tuple[Path, Path], tmp_path: Path, out: Path
) -> None:
    base, adapter = gemma
    quantized = parts.save_quantized(base, tmp_path / "base")
    qlora = parts.mark_qlora(parts.copy(adapter, tmp_path / "qlora"))

    with pytest.raises(BaseUnreadable, match=r"vision_tower.*is U8.*--route adapter --quantize nf4"):
        convert(Request(qlora, quantized, out, route="merge", quantize="none"))
    convert(Request(qlora, quantized, out, route="adapter"))

    expected = parts.logits(parts.with_adapter(parts.dequantized_model(base), qlora), PROMPT)
    actual = parts.logits(parts.with_adapter(parts.load_stored(quantized), out / "adapter"), PROMPT)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_the_files_of_the_processor_are_in_the_written_model(
    gemma: tuple[Path, Path], tmp_path: Path, out: Path
) -> None:
    base, adapter = gemma
    copied = parts.copy(base, tmp_path / "base")
    (copied / "preprocessor_config.json").write_text('{"image_processor_type": "Gemma3ImageProcessor"}')

    convert(Request(adapter, copied, out, route="merge", quantize="none", measure=False))

    file = "preprocessor_config.json"
    assert (out / "model" / file).read_bytes() == (copied / file).read_bytes()


def test_calibrated_quantizers_are_refused_before_anything_is_read(gemma: tuple[Path, Path], out: Path) -> None:
    from dataclasses import replace

    base, adapter = gemma
    request = replace(Request(adapter, base, out, route="merge", quantize="w8a8-int8").full, method="gptq")

    with pytest.raises(RouteRefused, match="--method gptq is for models of text alone"):
        run(request, Destination(out, "tiny"), silent)


def test_inspect_offers_the_ways_of_an_adapter_of_the_text_model(gemma: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = gemma
    other = parts.copy(adapter, tmp_path / "other")
    families.renamed(
        other, {"base_model.model.model.language_model.": "base_model.model.model."}, "adapter_model.safetensors"
    )

    offers = inspect(other, base).offers

    assert offers
    assert [offer.obstacle for offer in offers if offer.obstacle] == []


def test_two_modules_that_stand_for_one_are_refused(gemma: tuple[Path, Path], tmp_path: Path, out: Path) -> None:
    base, adapter = gemma
    other = parts.copy(adapter, tmp_path / "other")
    weights = load_file(other / "adapter_model.safetensors")
    of_text = {name.replace(".language_model.", ".", 1): value.clone() for name, value in weights.items()}
    save_file(weights | of_text, other / "adapter_model.safetensors")

    with pytest.raises(CheckpointUnsupported, match=r"two modules of the adapter stand for .*down_proj: keep one"):
        convert(Request(other, base, out, route="merge", quantize="none"))
