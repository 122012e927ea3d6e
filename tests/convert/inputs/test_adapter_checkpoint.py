from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from convert.errors import CheckpointUnreadable, CheckpointUnsupported
from convert.inputs.adapter_checkpoint import Checkpoint
from tests.convert import parts

MODULE = "model.layers.0.self_attn.q_proj"


def renamed(checkpoint: Path, rename: Any) -> None:
    parts.edit_weights(checkpoint, lambda tensors: {rename(name): tensor for name, tensor in tensors.items()})


def test_modules_ranks_and_scales_are_read(lora: Path) -> None:
    checkpoint = Checkpoint.open(lora)

    weights = checkpoint.lora_weights[MODULE]
    a, b = checkpoint.read(weights)

    assert len(checkpoint.lora_weights) == 14
    assert (weights.rank, weights.alpha, weights.scaling) == (8, 16, 2.0)
    assert (tuple(a.shape), tuple(b.shape)) == ((8, 64), (64, 8))
    assert checkpoint.targets == tuple(sorted(parts.LINEARS))
    checkpoint.require_supported()


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.removeprefix("base_model.model."),
        lambda name: name.replace("lora_A.weight", "lora_A.default.weight").replace(
            "lora_B.weight", "lora_B.default.weight"
        ),
        lambda name: re.sub(r"(lora_[AB])\.", r"\1.my-adapter v2.", name),
        lambda name: f"module.{name}",
        lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
        lambda name: f"_fsdp_wrapped_module.{name}".replace(".layers.0.", ".layers.0._fsdp_wrapped_module."),
    ],
    ids=["bare", "adapter name", "adapter name with a hyphen", "data parallel", "compiled", "fsdp"],
)
def test_every_trainers_key_means_the_same_module(lora: Path, tmp_path: Path, rename: Any) -> None:
    copied = parts.copy(lora, tmp_path / "copy")
    renamed(copied, rename)

    checkpoint = Checkpoint.open(copied)

    assert checkpoint.lora_weights.keys() == Checkpoint.open(lora).lora_weights.keys()
    assert checkpoint.problems == ()


def test_scales_follow_rslora_and_patterns(base: Path, tmp_path: Path) -> None:
    adapter = parts.save_adapter(
        base,
        tmp_path / "patterns",
        use_rslora=True,
        rank_pattern={"q_proj": 4, "layers.1.mlp.up_proj": 12},
        alpha_pattern={"q_proj": 3},
    )

    lora_weights = Checkpoint.open(adapter).lora_weights

    assert (lora_weights[MODULE].rank, lora_weights[MODULE].scaling) == (4, 3 / math.sqrt(4))
    assert (lora_weights["model.layers.1.mlp.up_proj"].rank, lora_weights["model.layers.0.mlp.up_proj"].rank) == (12, 8)
    assert lora_weights["model.layers.1.mlp.up_proj"].scaling == 16 / math.sqrt(12)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"use_dora": True}, "lora_magnitude_vector is missing"),
        ({"lora_bias": True}, "lora_bias=False"),
        ({"modules_to_save": ["lm_head"]}, "the file holds no weight of it"),
        ({"trainable_token_indices": [1]}, "the file holds no rows of them"),
        ({"fan_in_fan_out": True}, "transposed"),
        ({"init_lora_weights": "pissa_niter_16"}, "changed the base weights"),
        ({"init_lora_weights": "olora"}, "changed the base weights"),
        ({"init_lora_weights": "corda"}, "changed the base weights"),
        ({"init_lora_weights": "loftq"}, "changed the base weights"),
        ({"peft_type": "IA3"}, "only LORA"),
        ({"peft_type": ...}, "only LORA"),
        ({"layer_replication": [[0, 1]]}, "replicated"),
        ({"nvfp4_merge_aware": {"group": 16}}, "not known here"),
        ({"r": 16}, "says rank 16, the weights have 8"),
        ({"lora_alpha": "many"}, "not a number"),
        ({"rank_pattern": {"(": 4}}, "no valid pattern"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_no_route_can_follow_are_refused(
    lora: Path, tmp_path: Path, changed: dict[str, Any], says: str
) -> None:
    copied = parts.copy(lora, tmp_path / "copy")
    parts.edit_json(copied / "adapter_config.json", **changed)

    with pytest.raises(CheckpointUnsupported) as caught:
        Checkpoint.open(copied).require_supported()

    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("key", "says"),
    [
        (f"base_model.model.{MODULE}.lora_B.bias", "LoRA bias"),
        ("base_model.model.lm_head.modules_to_save.scale", "neither its weight nor its bias"),
        ("base_model.model.model.layers.0.mlp.ia3_l", "not a LoRA weight"),
        ("something.else", "not a LoRA weight"),
    ],
)
def test_unknown_keys_are_refused(lora: Path, tmp_path: Path, key: str, says: str) -> None:
    copied = parts.copy(lora, tmp_path / "copy")
    parts.edit_weights(copied, lambda tensors: {**tensors, key: torch.ones(2, 2)})

    with pytest.raises(CheckpointUnsupported) as caught:
        Checkpoint.open(copied).require_supported()

    assert says in str(caught.value)
    assert repr(key) in str(caught.value)


def test_all_problems_are_reported_at_once(lora: Path, tmp_path: Path) -> None:
    copied = parts.copy(lora, tmp_path / "copy")
    parts.edit_json(copied / "adapter_config.json", lora_bias=True, fan_in_fan_out=True)
    parts.edit_weights(copied, lambda tensors: {**tensors, "x": torch.ones(1)})

    assert len(Checkpoint.open(copied).problems) == 3


def test_problems_of_one_cause_are_one_line_with_their_number(lora: Path, tmp_path: Path) -> None:
    copied = parts.copy(lora, tmp_path / "copy")
    parts.edit_weights(copied, lambda ts: {name: t.flatten() if "lora_A" in name else t for name, t in ts.items()})

    checkpoint = Checkpoint.open(copied)
    with pytest.raises(CheckpointUnsupported) as caught:
        checkpoint.require_supported()

    lines = str(caught.value).splitlines()[1:]
    shapes = {tuple(spec.shape) for name, spec in checkpoint.tensors.specs.items() if "lora_A" in name}
    assert len(checkpoint.problems) >= 14
    assert len(lines) <= 2 * len(shapes) + 1
    assert "(the same in " in lines[0]


def test_a_without_b_is_refused(lora: Path, tmp_path: Path) -> None:
    copied = parts.copy(lora, tmp_path / "copy")
    lost = f"base_model.model.{MODULE}.lora_B.weight"
    parts.edit_weights(copied, lambda tensors: {name: t for name, t in tensors.items() if name != lost})

    assert Checkpoint.open(copied).problems == (
        f"{MODULE}: lora_B is missing; LoRA needs both A and B: save the adapter again",
    )


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_numbers_are_refused(lora: Path, tmp_path: Path, value: float) -> None:
    copied = parts.copy(lora, tmp_path / "copy")

    def poison(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors[f"base_model.model.{MODULE}.lora_A.weight"][3, 5] = value
        return tensors

    parts.edit_weights(copied, poison)

    with pytest.raises(CheckpointUnsupported, match=r"q_proj\.lora_A\.weight' holds NaN or Inf"):
        Checkpoint.open(copied).require_supported()


@pytest.mark.parametrize("how", ["zero B", "alpha 0"])
def test_an_adapter_that_changes_nothing_is_refused(lora: Path, tmp_path: Path, how: str) -> None:
    copied = parts.copy(lora, tmp_path / "copy")
    if how == "alpha 0":
        parts.edit_json(copied / "adapter_config.json", lora_alpha=0)
    else:
        parts.edit_weights(copied, lambda ts: {n: t * 0 if "lora_B" in n else t for n, t in ts.items()})

    with pytest.raises(CheckpointUnsupported, match="changes nothing"):
        Checkpoint.open(copied).require_supported()


def test_a_trainers_output_directory_is_answered_with_its_checkpoints(lora: Path, tmp_path: Path) -> None:
    for step in (20, 100):
        parts.copy(lora, tmp_path / f"checkpoint-{step}")

    with pytest.raises(CheckpointUnreadable, match=r"checkpoint-100, .*checkpoint-20"):
        Checkpoint.open(tmp_path)


def test_a_run_directory_of_ms_swift_is_answered_with_its_checkpoints(lora: Path, tmp_path: Path) -> None:
    parts.copy(lora, tmp_path / "v0-20260101-000000" / "checkpoint-20")

    with pytest.raises(CheckpointUnreadable, match=r"Give one checkpoint of it: .*v0-20260101-000000/checkpoint-20"):
        Checkpoint.open(tmp_path)


def test_a_whole_model_is_not_an_adapter(base: Path) -> None:
    with pytest.raises(CheckpointUnreadable, match="looks like a whole model"):
        Checkpoint.open(base)


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointUnreadable, match="does not exist"):
        Checkpoint.open(tmp_path / "nowhere")


@pytest.mark.parametrize("content", ["{", "[]", "null", "[" * 100_000], ids=["cut", "list", "null", "deep"])
def test_a_broken_configuration_is_reported(lora: Path, tmp_path: Path, content: str) -> None:
    copied = parts.copy(lora, tmp_path / "copy")
    (copied / "adapter_config.json").write_text(content)

    with pytest.raises(CheckpointUnreadable, match=r"adapter_config\.json"):
        Checkpoint.open(copied)


def test_trainer_files_beside_the_adapter_do_not_change_its_digest(lora: Path, tmp_path: Path) -> None:
    copied = parts.copy(lora, tmp_path / "copy")
    (copied / "trainer_state.json").write_text(json.dumps({"step": 3}))

    assert Checkpoint.open(copied).digest == Checkpoint.open(lora).digest


def test_modules_without_effect_give_a_warning(lora: Path, tmp_path: Path) -> None:
    copied = parts.copy(lora, tmp_path / "copy")
    parts.edit_weights(copied, lambda ts: {n: t * 0 if "layers.1" in n and "lora_B" in n else t for n, t in ts.items()})

    checkpoint = Checkpoint.open(copied)

    checkpoint.require_supported()
    assert checkpoint.warnings == (
        "7 of 14 adapted modules have a delta of zero, so nothing was learnt there: model.layers.1.mlp.down_proj, "
        "model.layers.1.mlp.gate_proj, model.layers.1.mlp.up_proj, …",
    )


def test_targets_without_weights_give_a_warning(lora: Path, tmp_path: Path) -> None:
    copied = parts.copy(lora, tmp_path / "copy")
    parts.edit_weights(copied, lambda ts: {n: t for n, t in ts.items() if "k_proj" not in n})

    assert Checkpoint.open(copied).warnings == ("target_modules names k_proj, the file holds no weights for it",)


def test_base_layers_in_the_file_are_left_out_with_a_warning(lora: Path, tmp_path: Path) -> None:
    copied = parts.copy(lora, tmp_path / "copy")
    base_layer = f"base_model.model.{MODULE}.base_layer.weight"
    quantized = {f"{base_layer}.absmax": torch.ones(64), base_layer: torch.ones(2048, 1, dtype=torch.uint8)}
    parts.edit_weights(copied, lambda tensors: tensors | quantized)

    checkpoint = Checkpoint.open(copied)

    assert checkpoint.problems == ()
    assert checkpoint.adapter_state.saved_weights == {}
    assert checkpoint.warnings == ("the base's own weights of 1 adapted layers are in the file too; they are left out",)
