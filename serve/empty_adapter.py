"""An adapter that changes nothing, for the slot of an engine that nobody may get."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
from safetensors.numpy import save_file

_MODULE = "model.layers.0.self_attn.q_proj"


def save_empty_adapter(directory: Path, in_features: int, out_features: int) -> None:
    """A LoRA of rank 1 on the first layer's query projection, all zeros, as PEFT lays it out."""
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"], "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    save_file(
        {
            f"base_model.model.{_MODULE}.lora_A.weight": numpy.zeros((1, in_features), numpy.float32),
            f"base_model.model.{_MODULE}.lora_B.weight": numpy.zeros((out_features, 1), numpy.float32),
        },
        directory / "adapter_model.safetensors",
    )
