"""Tiny random models of every family that is converted, made by transformers, and adapters of them, made by PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from tests.convert import parts

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": parts.VOCABULARY,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
HEADS: dict[str, Any] = {"head_dim": 16, "query_pre_attn_scalar": 16}
# What each does with its logits is large here: without it they are off by nats.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "ministral": {"head_dim": 16},
    "ministral3": {"head_dim": 16},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 16},
    "gemma2": {**HEADS, "final_logit_softcapping": 3.0},
    "gemma3_text": {**HEADS, "final_logit_softcapping": 3.0},
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25},
    "smollm3": {"pad_token_id": 0},
    "olmo2": {},
    "olmo3": {},
    "exaone4": {},
    "ernie4_5": {},
    "seed_oss": {"head_dim": 16},
    "phi3": {"pad_token_id": 0},
}
WITH_OTHER_LOGITS = ("gemma2", "gemma3_text", "granite", "cohere", "cohere2")


def random_model(family: str, layers: int = 1, dtype: torch.dtype = torch.float32) -> Any:
    """With weights large enough that no distribution is flat, and norms and biases that are not all the same."""
    config = AutoConfig.for_model(family, **SIZES, num_hidden_layers=layers, **FAMILIES[family])
    torch.manual_seed(3)
    # Of the implementations only this one caps attention as Gemma 2 was trained.
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def load(directory: Path) -> Any:
    """A model directory in float32, as transformers loads it. Every weight of the model is in it, and no other."""
    model, loading_info = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(loading_info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), loading_info
    return model.eval()


def save_base(family: str, directory: Path) -> Path:
    random_model(family, layers=2, dtype=torch.bfloat16).save_pretrained(directory)
    parts.save_tokenizer(directory)
    return directory


def save_adapter(base: Path, directory: Path, **settings: Any) -> Path:
    """On every linear layer but the head, with random B, trained on the weights as they are."""
    torch.manual_seed(5)
    lora = LoraConfig(r=4, lora_alpha=8, **{"target_modules": "all-linear", **settings})
    adapted = get_peft_model(load(base), lora)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    adapted.save_pretrained(directory)
    return parts.mark_lora(directory)


def save_tuned(family: str, home: Path) -> tuple[Path, Path]:
    """A base and an adapter of it, below `home`."""
    base = save_base(family, home / "base")
    return base, save_adapter(base, home / "adapter")
