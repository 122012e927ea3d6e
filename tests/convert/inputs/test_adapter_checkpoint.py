from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from convert.checkpoint import Checkpoint
from convert.errors import CheckpointUnreadable, CheckpointUnsupported
from tests.convert import parts

MODULE = "model.layers.0.self_attn.q_proj"


def renamed(checkpoint: Path, rename: Any) -> None:
    parts.edit_weights(checkpoint, lambda tensors: {rename(name): tensor for name, tensor in tensors.items()})


def test_modules_ranks_and_scales_are_read(lora: Path) -> None:
    checkpoint = Checkpoint.open(lora)

    pair = checkpoint.pairs[MODULE]
    a, b = checkpoint.read(pair)

    assert len(checkpoint.pairs) == 14
    assert (pair.rank, pair.alpha, pair.scaling) == (8, 16, 2.0)
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
        lambda name: f"module.{name}",
        lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
        lambda name: f"_fsdp_wrapped_module.{name}".replace(".layers.0.", ".layers.0._fsdp_wrapped_module."),
    ],
    ids=["bare", "adapter name", "data parallel", "compiled", "fsdp"],
)
def test_every_trainers_key_means_the_same_module(lora: Path, tmp_path: Path, rename: Any) -> None:
    copied = parts.copy(lora, tmp_path / "copy")
    renamed(copied, rename)

    checkpoint = Checkpoint.open(copied)

    assert checkpoint.pairs.keys() == Checkpoint.open(lora).pairs.keys()
    assert checkpoint.problems == ()


def test_scales_follow_rslora_and_patterns(base: Path, tmp_path: Path) -> None:
    made = parts.save_adapter(
        base,
        tmp_path / "patterns",
        use_rslora=True,
        rank_pattern={"q_proj": 4, "layers.1.mlp.up_proj": 12},
        alpha_pattern={"q_proj": 3},
    )

    pairs = Checkpoint.open(made).pairs

    assert (pairs[MODULE].rank, pairs[MODULE].scaling) == (4, 3 / math.sqrt(4))
    assert (pairs["model.layers.1.mlp.up_proj"].rank, pairs["model.layers.0.mlp.up_proj"].rank) == (12, 8)
    assert pairs["model.layers.1.mlp.up_proj"].scaling == 16 / math.sqrt(12)


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
def test_keys_that_are_nothing_known_are_refused(lora: Path, tmp_path: Path, key: str, says: str) -> None:
    copied = parts.copy(lora, tmp_path / "copy")
    parts.edit_weights(copied, lambda tensors: {**tensors, key: torch.ones(2, 2)})

    with pytest.raises(CheckpointUnsupported) as caught:
        Checkpoint.open(copied).require_supported()

    assert says in str(caught.value)
    assert repr(key) in str(caught.value)


def test_all_problems_are_told_at_once(lora: Path, tmp_path: Path) -> None:
    copied = parts.copy(lora, tmp_path / "copy")
    parts.edit_json(copied / "adapter_config.json", lora_bias=True, fan_in_fan_out=True)
    parts.edit_weights(copied, lambda tensors: {**tensors, "x": torch.ones(1)})

    assert len(Checkpoint.open(copied).problems) == 3


def test_half_a_pair_is_refused(lora: Path, tmp_path: Path) -> None:
    copied = parts.copy(lora, tmp_path / "copy")
    lost = f"base_model.model.{MODULE}.lora_B.weight"
    parts.edit_weights(copied, lambda tensors: {name: t for name, t in tensors.items() if name != lost})

    assert Checkpoint.open(copied).problems == (
        f"{MODULE}: lora_B is missing, half a pair has no meaning: save the adapter again",
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

    with pytest.raises(CheckpointUnreadable, match=r"checkpoint-20, .*checkpoint-100"):
        Checkpoint.open(tmp_path)


def test_a_run_directory_of_ms_swift_is_told_to_hold_checkpoints(lora: Path, tmp_path: Path) -> None:
    parts.copy(lora, tmp_path / "v0-20260101-000000" / "checkpoint-20")

    with pytest.raises(CheckpointUnreadable, match=r"Give one checkpoint of it: .*v0-20260101-000000/checkpoint-20"):
        Checkpoint.open(tmp_path)


def test_a_whole_model_is_not_an_adapter(base: Path) -> None:
    with pytest.raises(CheckpointUnreadable, match="looks like a whole model"):
        Checkpoint.open(base)


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointUnreadable, match="not a directory"):
        Checkpoint.open(tmp_path / "nowhere")


@pytest.mark.parametrize("content", ["{", "[]", "null", "[" * 100_000], ids=["cut", "list", "null", "deep"])
def test_a_broken_configuration_is_told(lora: Path, tmp_path: Path, content: str) -> None:
    copied = parts.copy(lora, tmp_path / "copy")
    (copied / "adapter_config.json").write_text(content)

    with pytest.raises(CheckpointUnreadable, match=r"adapter_config\.json"):
        Checkpoint.open(copied)


def test_notes_beside_the_adapter_do_not_change_its_digest(lora: Path, tmp_path: Path) -> None:
    copied = parts.copy(lora, tmp_path / "copy")
    (copied / "trainer_state.json").write_text(json.dumps({"step": 3}))

    assert Checkpoint.open(copied).digest == Checkpoint.open(lora).digest


def test_modules_without_effect_are_noted(lora: Path, tmp_path: Path) -> None:
    copied = parts.copy(lora, tmp_path / "copy")
    parts.edit_weights(copied, lambda ts: {n: t * 0 if "layers.1" in n and "lora_B" in n else t for n, t in ts.items()})

    checkpoint = Checkpoint.open(copied)

    checkpoint.require_supported()
    assert checkpoint.notes == (
        "7 of 14 adapted modules have a delta of zero, so nothing was learnt there: model.layers.1.mlp.down_proj, "
        "model.layers.1.mlp.gate_proj, model.layers.1.mlp.up_proj, …",
    )


def test_targets_without_weights_are_noted(lora: Path, tmp_path: Path) -> None:
    copied = parts.copy(lora, tmp_path / "copy")
    parts.edit_weights(copied, lambda ts: {n: t for n, t in ts.items() if "k_proj" not in n})

    assert Checkpoint.open(copied).notes == ("target_modules names k_proj, the file holds no weights for it",)


def test_copies_of_the_base_below_adapted_layers_are_left_out_and_noted(lora: Path, tmp_path: Path) -> None:
    copied = parts.copy(lora, tmp_path / "copy")
    below = f"base_model.model.{MODULE}.base_layer.weight"
    quantized = {f"{below}.absmax": torch.ones(64), below: torch.ones(2048, 1, dtype=torch.uint8)}
    parts.edit_weights(copied, lambda tensors: tensors | quantized)

    checkpoint = Checkpoint.open(copied)

    assert checkpoint.problems == ()
    assert checkpoint.contents.saved == {}
    assert checkpoint.notes == ("copies of the base's own weights below 1 adapted layers are left out",)


WORDS = st.sampled_from(
    [
        "base_model",
        "model",
        "module",
        "layers",
        "0",
        "1",
        "99",
        "self_attn",
        "q_proj",
        "mlp",
        "up_proj",
        "embed_tokens",
        "lm_head",
        "norm",
        "lora_A",
        "lora_B",
        "default",
        "lora_embedding_A",
        "lora_embedding_B",
        "lora_magnitude_vector",
        "weight",
        "bias",
        "base_layer",
        "modules_to_save",
        "token_adapter",
        "trainable_tokens_delta",
        "attn",
        "output_proj",
        "w1",
        "lora_a",
        "lora_b",
        "output",
        "_orig_mod",
        "x",
    ]
)
KEYS = st.lists(WORDS, min_size=1, max_size=9).map(".".join)
SHAPES = st.sampled_from([(8, 64), (64, 8), (64,), (2, 64), (272, 64), (8, 272), (1, 1, 1), (0, 8), ()])
SETTINGS = st.sampled_from([None, True, 8, "lm_head", [1, 2], ["lm_head"], {"embed_tokens": [1, 2]}, {"q_proj": 8}])


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    keys=st.dictionaries(KEYS, SHAPES, max_size=6),
    config=st.dictionaries(
        st.sampled_from(["use_dora", "modules_to_save", "trainable_token_indices", "target_modules", "rank_pattern"]),
        SETTINGS,
    ),
)
def test_any_keys_and_settings_give_contents_or_problems(
    lora: Path, tmp_path: Path, keys: dict[str, tuple[int, ...]], config: dict[str, Any]
) -> None:
    root = tmp_path / "any"
    root.mkdir(exist_ok=True)
    document = json.loads((lora / "adapter_config.json").read_text()) | config
    (root / "adapter_config.json").write_text(json.dumps(document))
    save_file({key: torch.ones(shape) for key, shape in keys.items()}, root / "adapter_model.safetensors")

    checkpoint = Checkpoint.open(root)

    assert checkpoint.all_problems or not checkpoint.contents.is_empty
    for spec in checkpoint.contents.specs:
        assert spec.name in keys
