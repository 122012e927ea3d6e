"""An adapter moved onto another form of its base, against the function as trained, computed by peft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from convert.base_model import BaseModel
from convert.checkpoint import Checkpoint
from convert.errors import BaseMismatch, RouteRefused
from convert.nf4 import Nf4
from convert.progress import silent
from convert.routes.rebase import Rebased, inputs_as_trained, rebase
from tests.convert import parts


@pytest.fixture
def moved(tmp_path: Path) -> Path:
    folder = tmp_path / "moved"
    folder.mkdir()
    return folder


def move(
    moved: Path, adapter: Path, base: Path, quantizer: Nf4 | None, onto: Path, rank: int, **settings: Any
) -> Rebased:
    checkpoint, opened = Checkpoint.open(adapter), BaseModel.open(base)
    return rebase(moved, checkpoint, opened, quantizer, BaseModel.open(onto), rank, silent, **settings)


def as_trained(base: Path, adapter: Path) -> torch.Tensor:
    return parts.logits(parts.with_adapter(parts.dequantized_model(base), adapter))


def test_of_full_rank_the_function_on_the_new_base_is_the_one_that_was_trained(
    qlora: Path, base: Path, moved: Path
) -> None:
    rebased = move(moved, qlora, base, Nf4(), base, 128)

    found = parts.logits(parts.with_adapter(parts.load_float32(base), moved))
    torch.testing.assert_close(found, as_trained(base, qlora), rtol=1e-3, atol=1e-3)
    assert rebased.residual < 1e-3
    assert 0.05 < rebased.difference < 0.2
    assert rebased.modules == 14


def test_a_small_rank_comes_nearer_than_the_adapter_as_it_is(qlora: Path, base: Path, moved: Path) -> None:
    move(moved, qlora, base, Nf4(), base, 32)

    expected, full = as_trained(base, qlora), parts.load_float32(base)
    before = parts.divergence(expected, parts.logits(parts.with_adapter(full, qlora)))
    after = parts.divergence(expected, parts.logits(parts.with_adapter(parts.load_float32(base), moved)))
    assert after < 0.7 * before


def test_weighted_by_what_the_layers_read_it_comes_nearer_still(qlora: Path, base: Path, tmp_path: Path) -> None:
    torch.manual_seed(2)
    # Text has structure that random tokens lack: here, few different ones.
    rows = [torch.randint(20, 40, (1, 48)) for _ in range(9)]
    seen = inputs_as_trained(Checkpoint.open(qlora), BaseModel.open(base), Nf4(), rows[1:], silent)
    expected = parts.logits(parts.with_adapter(parts.dequantized_model(base), qlora), rows[0])
    found = {}
    for name, inputs in (("plain", None), ("weighted", seen)):
        (folder := tmp_path / name).mkdir()
        move(folder, qlora, base, Nf4(), base, 16, inputs=inputs)
        found[name] = parts.logits(parts.with_adapter(parts.load_float32(base), folder), rows[0])

    assert parts.divergence(expected, found["weighted"]) < 0.8 * parts.divergence(expected, found["plain"])


def test_a_lora_moves_onto_a_4_bit_base(lora: Path, base: Path, nf4_base: Path, moved: Path) -> None:
    move(moved, lora, base, None, nf4_base, 128)

    expected = parts.logits(parts.with_adapter(parts.load_float32(base), lora))
    found = parts.logits(parts.with_adapter(parts.load_stored(nf4_base), moved))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_a_4_bit_base_stored_otherwise_takes_it_too(qlora: Path, base: Path, tmp_path: Path, moved: Path) -> None:
    single = parts.save_quantized(base, tmp_path / "single", double=False)

    move(moved, qlora, base, Nf4(), single, 128)

    found = parts.logits(parts.with_adapter(parts.load_stored(single), moved))
    torch.testing.assert_close(found, as_trained(base, qlora), rtol=1e-3, atol=1e-3)


def test_layers_without_an_adapter_get_a_pair_where_they_differ(base: Path, tmp_path: Path, moved: Path) -> None:
    some = parts.mark_qlora(parts.save_adapter(base, tmp_path / "some", target_modules=["q_proj", "v_proj"]))

    rebased = move(moved, some, base, Nf4(), base, 128)

    assert rebased.modules == 14
    assert json.loads((moved / "adapter_config.json").read_text())["target_modules"] == sorted(parts.LINEARS)
    found = parts.logits(parts.with_adapter(parts.load_float32(base), moved))
    torch.testing.assert_close(found, as_trained(base, some), rtol=1e-3, atol=1e-3)


def test_nothing_is_added_where_nothing_differs(base: Path, nf4_base: Path, tmp_path: Path, moved: Path) -> None:
    some = parts.save_adapter(base, tmp_path / "some", target_modules=["q_proj"])

    rebased = move(moved, some, base, Nf4(), nf4_base, 16)

    assert (rebased.modules, rebased.difference, rebased.residual) == (2, 0, 0)
    found = parts.logits(parts.with_adapter(parts.load_float32(base), moved))
    torch.testing.assert_close(found, parts.logits(parts.with_adapter(parts.load_float32(base), some)))


def test_patterns_of_rank_and_scale_become_one(base: Path, tmp_path: Path, moved: Path) -> None:
    mixed = parts.save_adapter(
        base, tmp_path / "mixed", use_rslora=True, rank_pattern={"q_proj": 3}, alpha_pattern={"down_proj": 5}
    )

    move(moved, mixed, base, None, base, 16)

    config = json.loads((moved / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["use_rslora"]) == (16, 16, {}, False)
    ranks = {tensor.shape[0] for name, tensor in load_file(moved / "adapter_model.safetensors").items() if "A" in name}
    assert ranks == {16}
    found = parts.logits(parts.with_adapter(parts.load_float32(base), moved))
    expected = parts.logits(parts.with_adapter(parts.load_float32(base), mixed))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_same_input_gives_the_same_bytes(qlora: Path, base: Path, tmp_path: Path) -> None:
    written = []
    for name in ("one", "two"):
        (folder := tmp_path / name).mkdir()
        move(folder, qlora, base, Nf4(), base, 16)
        written.append((folder / "adapter_model.safetensors").read_bytes())

    assert written[0] == written[1]


def test_another_model_of_the_same_shape_is_refused(qlora: Path, base: Path, tmp_path: Path, moved: Path) -> None:
    other = parts.copy(base, tmp_path / "other")
    torch.manual_seed(9)
    changed = {n: torch.randn_like(t) if "proj" in n else t for n, t in load_file(base / "model.safetensors").items()}
    save_file(changed, other / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(BaseMismatch, match="is another model than"):
        move(moved, qlora, base, Nf4(), other, 32)


def test_a_model_of_another_shape_is_refused(qlora: Path, base: Path, tmp_path: Path, moved: Path) -> None:
    other = parts.save_base(tmp_path / "other", tied=True, layers=1)

    with pytest.raises(BaseMismatch, match=r"no form of the same model(.|\n)*layers\.1"):
        move(moved, qlora, base, Nf4(), other, 32)


def test_a_base_whose_quantizer_moved_scales_between_layers_is_refused(
    qlora: Path, base: Path, tmp_path: Path, moved: Path
) -> None:
    smoothed = parts.copy(base, tmp_path / "smoothed")
    weights = load_file(base / "model.safetensors")
    weights["model.layers.0.input_layernorm.weight"] /= 2
    for name in ("q_proj", "k_proj", "v_proj"):
        weights[f"model.layers.0.self_attn.{name}.weight"] *= 2
    save_file(weights, smoothed / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(BaseMismatch, match="moved scales between layers"):
        move(moved, qlora, base, Nf4(), smoothed, 32)


def test_a_rank_below_the_adapters_is_refused(base: Path, tmp_path: Path, moved: Path) -> None:
    large = parts.mark_qlora(parts.save_adapter(base, tmp_path / "large", r=32))

    with pytest.raises(RouteRefused, match="one of 32, 64, 128"):
        move(moved, large, base, Nf4(), base, 16)
