"""Multimodal models, of which the language model is converted, against transformers and PEFT on the whole model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from convert.errors import QualityGateFailed
from tests.convert import families, parts
from tests.convert.asking import Request, convert
from tests.convert.families import MULTIMODAL

PROMPT = torch.arange(2, 42)[None]
# As files of transformers before 4.52, and those of most publishers, name the language model, and as later ones do.
NEWER_NAMES = {
    "gemma3": {"language_model.model.": "model.language_model.", "language_model.lm_head.": "lm_head."},
    "qwen2_5_vl": {"visual.": "model.visual.", "model.": "model.language_model."},
}
NEWER_NAMES["gemma3"] |= {
    "vision_tower.": "model.vision_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.",
}
NEWER_NAMES["mistral3"] = NEWER_NAMES["gemma3"]


@pytest.fixture(scope="module", params=MULTIMODAL)
def tuned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """A family, a base of it and an adapter of its language model."""
    return request.param, *families.save_tuned(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base with a tied head, and an adapter."""
    return families.save_tuned("gemma3", tmp_path_factory.mktemp("gemma"))


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().view(torch.uint8).flatten().tolist())


@pytest.mark.parametrize("names", ["older", "newer"])
def test_a_merge_keeps_every_name_and_what_is_not_language_byte_for_byte(
    tuned: tuple[str, Path, Path], names: str, tmp_path: Path, out: Path
) -> None:
    family, base, adapter = tuned
    copied = families.renamed(parts.copy(base, tmp_path / "base"), NEWER_NAMES[family] if names == "newer" else {})

    artifact = convert(Request(adapter, copied, out, route="merge", quantize="none"))

    before, after = weights_of(copied), weights_of(out / "model")
    assert any(name.startswith("model.language_model.") for name in before) == (names == "newer")
    assert after.keys() == before.keys()
    others = [name for name in before if not families.is_language(name)]
    assert len(others) > 10
    assert [name for name in others if bits(before[name]) != bits(after[name])] == []
    merged = families.as_trained(base, adapter).merge_and_unload()
    torch.testing.assert_close(
        dict(families.load(out / "model").state_dict()), dict(merged.state_dict()), rtol=2**-8, atol=1e-6
    )
    assert artifact.manifest.quality
    assert artifact.manifest.quality.kl_mean < artifact.manifest.quality.kl_base / 100


def test_a_qlora_is_separate_on_the_weights_that_bitsandbytes_makes_of_the_language_model(
    tuned: tuple[str, Path, Path], tmp_path: Path, out: Path
) -> None:
    _, base, adapter = tuned
    qlora = parts.mark_qlora(parts.copy(adapter, tmp_path / "qlora"))

    artifact = convert(Request(qlora, base, out, route="adapter"))

    assert artifact.manifest.model.quantization == "nf4-double"
    trained, stored = parts.dequantized_model(base), parts.load_stored(out / "model")
    weights = dict(trained.state_dict())
    assert stored.state_dict().keys() == weights.keys()
    of_base = families.load(base).state_dict()
    loaded = parts.auto_class(base).from_pretrained(out / "model").state_dict()
    for name, weight in stored.state_dict().items():
        equal = (
            torch.equal(weight, weights[name])
            if families.is_language(name)
            else torch.equal(loaded[name], of_base[name])
        )
        assert equal, name
    actual = parts.logits(parts.with_adapter(stored, out / "adapter"), PROMPT)
    expected = parts.logits(parts.with_adapter(trained, qlora), PROMPT)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    assert artifact.manifest.quality
    alone = parts.logits(parts.dequantized_model(base), PROMPT)
    assert artifact.manifest.quality.kl_mean < parts.divergence(expected, alone) / 1000


def test_a_qlora_is_merged_onto_the_weights_that_it_was_trained_on(
    tuned: tuple[str, Path, Path], tmp_path: Path, out: Path
) -> None:
    _, base, adapter = tuned
    qlora = parts.mark_qlora(parts.copy(adapter, tmp_path / "qlora"))

    convert(Request(qlora, base, out, route="merge", quantize="none"))

    trained = parts.with_adapter(parts.dequantized_model(base), qlora).merge_and_unload()
    language = {name: weight for name, weight in trained.state_dict().items() if families.is_language(name)}
    merged = families.load(out / "model").state_dict()
    torch.testing.assert_close({name: merged[name] for name in language}, language, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize(("name", "loss"), [("w8a8-int8", 0.1), ("fp8-dynamic", 0.1), ("w4a16", 0.5), ("nf4", 0.3)])
def test_a_merged_language_model_is_stored_in_every_format_and_nothing_else_is(
    gemma: tuple[Path, Path], out: Path, name: Any, loss: float
) -> None:
    base, adapter = gemma

    artifact = convert(Request(adapter, base, out, route="merge", quantize=name, target="cuda:8.9", max_kl=10))

    loaded = parts.auto_class(base).from_pretrained(out / "model", dtype=torch.bfloat16).eval()
    trained = parts.logits(families.as_trained(base, adapter), PROMPT)
    learnt = parts.divergence(trained, parts.logits(families.load(base), PROMPT))
    assert artifact.manifest.model.quantization.startswith(name)
    assert parts.divergence(trained, parts.logits(loaded, PROMPT)) < loss * learnt
    before, after = weights_of(base), weights_of(out / "model")
    others = [key for key in before if not families.is_language(key)]
    assert all(bits(before[key]) == bits(after[key]) for key in others)


def test_canaries_are_asked_of_the_language_model(gemma: tuple[Path, Path], tmp_path: Path, out: Path) -> None:
    base, adapter = gemma
    canaries = tmp_path / "canaries.jsonl"
    question = {"messages": [{"role": "user", "content": "the rain"}], "expect": "never said by anybody"}
    canaries.write_text(json.dumps(question))

    with pytest.raises(QualityGateFailed, match="fails 1 of 1 canaries itself"):
        convert(Request(adapter, base, out, route="merge", quantize="none", canaries=canaries))
