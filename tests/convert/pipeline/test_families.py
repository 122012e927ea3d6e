"""Every family through a whole conversion, against transformers and PEFT on the untouched files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from convert.errors import BaseMismatch
from convert.inputs.architecture import FAMILIES
from convert.inputs.base_model import BaseModel
from tests.convert import families, parts
from tests.convert.asking import Request, convert

PROMPT = torch.arange(2, 42)[None]


@pytest.fixture(scope="module", params=FAMILIES)
def tuned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base and an adapter of one family."""
    return families.save_tuned(request.param, tmp_path_factory.mktemp(request.param))


def test_a_merged_model_is_what_peft_merges(tuned: tuple[Path, Path], out: Path) -> None:
    base, adapter = tuned

    artifact = convert(Request(adapter, base, out, route="merge", quantize="none"))

    trained, merged = families.as_trained(base, adapter), families.load(out / "model")
    expected, actual = parts.logits(trained, PROMPT), parts.logits(merged, PROMPT)
    learnt = parts.divergence(expected, parts.logits(families.load(base), PROMPT))
    assert learnt > 0.01
    assert parts.divergence(expected, actual) < learnt / 100
    # One rounding to bfloat16: half a unit in the last of eight places.
    torch.testing.assert_close(
        dict(merged.state_dict()), dict(trained.merge_and_unload().state_dict()), rtol=2**-8, atol=1e-6
    )
    assert artifact.manifest.quality
    assert artifact.manifest.quality.kl_mean < artifact.manifest.quality.kl_base / 100


def test_a_separate_adapter_on_a_written_base_is_the_function_as_trained(tuned: tuple[Path, Path], out: Path) -> None:
    base, adapter = tuned

    convert(Request(adapter, base, out, route="adapter", quantize="none", measure=False))

    separate = parts.logits(families.as_trained(out / "model", out / "adapter"), PROMPT)
    torch.testing.assert_close(separate, parts.logits(families.as_trained(base, adapter), PROMPT), atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base with fused layers, and a QLoRA of it."""
    base, adapter = families.save_tuned("phi3", tmp_path_factory.mktemp("fused"))
    return base, parts.mark_qlora(adapter)


def test_a_qlora_on_fused_layers_is_separate_on_the_weights_that_bitsandbytes_makes_of_them(
    fused: tuple[Path, Path], out: Path
) -> None:
    base, qlora = fused

    artifact = convert(Request(qlora, base, out, route="adapter"))

    assert artifact.manifest.model.quantization == "nf4-double"
    trained, stored = parts.dequantized_model(base), parts.load_stored(out / "model")
    assert stored.state_dict().keys() == trained.state_dict().keys()
    for name, weight in trained.state_dict().items():
        assert torch.equal(stored.state_dict()[name], weight), name
    actual = parts.logits(parts.with_adapter(stored, out / "adapter"), PROMPT)
    torch.testing.assert_close(actual, parts.logits(parts.with_adapter(trained, qlora), PROMPT), atol=1e-4, rtol=1e-4)


def test_a_qlora_on_fused_layers_is_merged_onto_the_weights_that_it_was_trained_on(
    fused: tuple[Path, Path], out: Path
) -> None:
    base, qlora = fused

    convert(Request(qlora, base, out, route="merge", quantize="none"))

    trained = parts.with_adapter(parts.dequantized_model(base), qlora).merge_and_unload()
    merged = dict(families.load(out / "model").state_dict())
    torch.testing.assert_close(merged, dict(trained.state_dict()), rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize(("name", "loss"), [("w8a8-int8", 0.1), ("fp8-dynamic", 0.1), ("w4a16", 0.5)])
def test_a_merged_model_with_fused_layers_is_stored_in_every_format(
    fused: tuple[Path, Path], out: Path, name: Any, loss: float
) -> None:
    base, qlora = fused

    artifact = convert(Request(qlora, base, out, route="merge", quantize=name, target="cuda:8.9", max_kl=10))

    trained = parts.logits(parts.with_adapter(parts.dequantized_model(base), qlora), PROMPT)
    stored = parts.logits(parts.float32_of(BaseModel.open(out / "model")), PROMPT)
    assert artifact.manifest.model.quantization == name
    assert parts.divergence(trained, stored) < loss * parts.divergence(
        trained, parts.logits(families.load(base), PROMPT)
    )


@pytest.mark.parametrize(
    ("trained_on", "given", "says"),
    [
        (
            "llama",
            "phi3",
            r"gate_proj: in the base it is a part of model\.layers\.0\.mlp\.gate_up_proj: train on qkv_proj, ",
        ),
        ("phi3", "llama", r"gate_up_proj: the base has no such linear layer.*For a llama train on q_proj, k_proj, "),
    ],
    ids=["on the parts", "on the whole"],
)
def test_an_adapter_on_the_parts_of_a_fused_layer_is_refused_with_the_layers_that_there_are(
    trained_on: str, given: str, says: str, tmp_path: Path, out: Path
) -> None:
    adapter = families.save_adapter(families.save_base(trained_on, tmp_path / "trained_on"), tmp_path / "adapter")
    base = families.save_base(given, tmp_path / "given")

    with pytest.raises(BaseMismatch, match=says):
        convert(Request(adapter, base, out, route="merge", quantize="none"))
