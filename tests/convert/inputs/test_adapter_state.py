"""Whatever keys, shapes and settings an adapter has: an adapter state, or problems with a reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from convert.inputs.adapter_checkpoint import Checkpoint

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
def test_any_keys_and_settings_give_an_adapter_state_or_problems(
    lora: Path, tmp_path: Path, keys: dict[str, tuple[int, ...]], config: dict[str, Any]
) -> None:
    root = tmp_path / "any"
    root.mkdir(exist_ok=True)
    document = json.loads((lora / "adapter_config.json").read_text()) | config
    (root / "adapter_config.json").write_text(json.dumps(document))
    save_file({key: torch.ones(shape) for key, shape in keys.items()}, root / "adapter_model.safetensors")

    checkpoint = Checkpoint.open(root)

    assert checkpoint.all_problems or not checkpoint.adapter_state.is_empty
    state = checkpoint.adapter_state
    used = {spec.name for spec in (*state.specs, *state.base_layers.values(), *(second for _, second in state.doubled))}
    assert used | state.unread <= keys.keys()
    assert checkpoint.problems or used | state.unread == keys.keys()
