"""An adapter moved onto another form of its base, against the function as trained, computed by peft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from convert.errors import BaseMismatch, RouteRefused
from convert.inputs.adapter_checkpoint import Checkpoint
from convert.inputs.base_model import BaseModel
from convert.progress import silent
from convert.quantization.nf4 import Nf4
from convert.routes.rebase import Rebased, activations_as_trained, rebase
from convert.routes.trained_adapter import TrainedAdapter
from tests.convert import parts


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "rebased"
    folder.mkdir()
    return folder


def rebase_into(
    folder: Path, adapter: Path, base: Path, quantizer: Nf4 | None, onto: Path, rank: int, **settings: Any
) -> Rebased:
    trained = TrainedAdapter(Checkpoint.open(adapter), BaseModel.open(base), quantizer)
    return rebase(folder, trained, BaseModel.open(onto), rank, silent, **settings)


def as_trained(base: Path, adapter: Path) -> torch.Tensor:
    return parts.logits(parts.with_adapter(parts.dequantized_model(base), adapter))


def test_of_full_rank_the_function_on_the_new_base_is_the_one_that_was_trained(
    qlora: Path, base: Path, folder: Path
) -> None:
    rebased = rebase_into(folder, qlora, base, Nf4(), base, 128)

    rebased_logits = parts.logits(parts.with_adapter(parts.load_float32(base), folder))
    torch.testing.assert_close(rebased_logits, as_trained(base, qlora), rtol=1e-3, atol=1e-3)
    assert rebased.residual < 1e-3
    assert 0.05 < rebased.difference < 0.2
    assert rebased.modules == 14


def test_a_small_rank_comes_nearer_than_the_adapter_as_it_is(qlora: Path, base: Path, folder: Path) -> None:
    rebase_into(folder, qlora, base, Nf4(), base, 32)

    expected, full = as_trained(base, qlora), parts.load_float32(base)
    before = parts.divergence(expected, parts.logits(parts.with_adapter(full, qlora)))
    after = parts.divergence(expected, parts.logits(parts.with_adapter(parts.load_float32(base), folder)))
    assert after < 0.7 * before


def test_weighted_by_what_the_layers_read_it_comes_nearer_still(qlora: Path, base: Path, tmp_path: Path) -> None:
    torch.manual_seed(2)
    # Text has structure that random tokens lack: here, few different ones.
    rows = [torch.randint(20, 40, (1, 48)) for _ in range(9)]
    trained = TrainedAdapter(Checkpoint.open(qlora), BaseModel.open(base), Nf4())
    recorded = activations_as_trained(trained, rows[1:], silent)
    expected = parts.logits(parts.with_adapter(parts.dequantized_model(base), qlora), rows[0])
    rebased_logits = {}
    for name, activations in (("plain", None), ("weighted", recorded)):
        (folder := tmp_path / name).mkdir()
        rebase_into(folder, qlora, base, Nf4(), base, 16, activations=activations)
        rebased_logits[name] = parts.logits(parts.with_adapter(parts.load_float32(base), folder), rows[0])

    plain, weighted = rebased_logits["plain"], rebased_logits["weighted"]
    assert parts.divergence(expected, weighted) < 0.8 * parts.divergence(expected, plain)


def test_a_lora_moves_onto_a_4_bit_base(lora: Path, base: Path, nf4_base: Path, folder: Path) -> None:
    rebase_into(folder, lora, base, None, nf4_base, 128)

    expected = parts.logits(parts.with_adapter(parts.load_float32(base), lora))
    rebased_logits = parts.logits(parts.with_adapter(parts.load_stored(nf4_base), folder))
    torch.testing.assert_close(rebased_logits, expected, rtol=1e-3, atol=1e-3)


def test_a_4_bit_base_stored_otherwise_takes_it_too(qlora: Path, base: Path, tmp_path: Path, folder: Path) -> None:
    single = parts.save_quantized(base, tmp_path / "single", double=False)

    rebase_into(folder, qlora, base, Nf4(), single, 128)

    rebased_logits = parts.logits(parts.with_adapter(parts.load_stored(single), folder))
    torch.testing.assert_close(rebased_logits, as_trained(base, qlora), rtol=1e-3, atol=1e-3)


def test_layers_without_an_adapter_get_lora_weights_where_they_differ(base: Path, tmp_path: Path, folder: Path) -> None:
    some = parts.mark_qlora(parts.save_adapter(base, tmp_path / "some", target_modules=["q_proj", "v_proj"]))

    rebased = rebase_into(folder, some, base, Nf4(), base, 128)

    assert rebased.modules == 14
    assert json.loads((folder / "adapter_config.json").read_text())["target_modules"] == sorted(parts.LINEARS)
    rebased_logits = parts.logits(parts.with_adapter(parts.load_float32(base), folder))
    torch.testing.assert_close(rebased_logits, as_trained(base, some), rtol=1e-3, atol=1e-3)


def test_nothing_is_added_where_nothing_differs(base: Path, nf4_base: Path, tmp_path: Path, folder: Path) -> None:
    some = parts.save_adapter(base, tmp_path / "some", target_modules=["q_proj"])

    rebased = rebase_into(folder, some, base, Nf4(), nf4_base, 16)

    assert (rebased.modules, rebased.difference, rebased.residual) == (2, 0, 0)
    rebased_logits = parts.logits(parts.with_adapter(parts.load_float32(base), folder))
    torch.testing.assert_close(rebased_logits, parts.logits(parts.with_adapter(parts.load_float32(base), some)))


def test_patterns_of_rank_and_scale_become_one(base: Path, tmp_path: Path, folder: Path) -> None:
    mixed = parts.save_adapter(
        base, tmp_path / "mixed", use_rslora=True, rank_pattern={"q_proj": 3}, alpha_pattern={"down_proj": 5}
    )

    rebase_into(folder, mixed, base, None, base, 16)

    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["use_rslora"]) == (16, 16, {}, False)
    tensors = load_file(folder / "adapter_model.safetensors")
    ranks = {tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name}
    assert ranks == {16}
    rebased_logits = parts.logits(parts.with_adapter(parts.load_float32(base), folder))
    expected = parts.logits(parts.with_adapter(parts.load_float32(base), mixed))
    torch.testing.assert_close(rebased_logits, expected, rtol=1e-4, atol=1e-4)


def test_the_same_input_gives_the_same_bytes(qlora: Path, base: Path, tmp_path: Path) -> None:
    written = []
    for name in ("first", "second"):
        (folder := tmp_path / name).mkdir()
        rebase_into(folder, qlora, base, Nf4(), base, 16)
        written.append((folder / "adapter_model.safetensors").read_bytes())

    assert written[0] == written[1]


def test_another_model_of_the_same_shape_is_refused(qlora: Path, base: Path, tmp_path: Path, folder: Path) -> None:
    other = parts.copy(base, tmp_path / "other")
    torch.manual_seed(9)
    changed = {n: torch.randn_like(t) if "proj" in n else t for n, t in load_file(base / "model.safetensors").items()}
    save_file(changed, other / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(BaseMismatch, match="is another model than"):
        rebase_into(folder, qlora, base, Nf4(), other, 32)


def test_a_model_of_another_shape_is_refused(qlora: Path, base: Path, tmp_path: Path, folder: Path) -> None:
    other = parts.save_base(tmp_path / "other", tied=True, layers=1)

    with pytest.raises(BaseMismatch, match=r"not a form of the same model(.|\n)*layers\.1"):
        rebase_into(folder, qlora, base, Nf4(), other, 32)


def test_a_base_whose_quantizer_moved_scales_between_layers_is_refused(
    qlora: Path, base: Path, tmp_path: Path, folder: Path
) -> None:
    smoothed = parts.copy(base, tmp_path / "smoothed")
    weights = load_file(base / "model.safetensors")
    weights["model.layers.0.input_layernorm.weight"] /= 2
    for name in ("q_proj", "k_proj", "v_proj"):
        weights[f"model.layers.0.self_attn.{name}.weight"] *= 2
    save_file(weights, smoothed / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(BaseMismatch, match="moved scales between layers"):
        rebase_into(folder, qlora, base, Nf4(), smoothed, 32)


def test_a_rank_below_the_adapters_is_refused(base: Path, tmp_path: Path, folder: Path) -> None:
    large = parts.mark_qlora(parts.save_adapter(base, tmp_path / "large", r=32))

    with pytest.raises(RouteRefused, match="one of 32, 64, 128"):
        rebase_into(folder, large, base, Nf4(), base, 16)
