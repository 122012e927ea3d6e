"""Checkpoints in which more was trained than LoRA on linear layers, saved by PEFT itself."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.convert import parts

# Name -> settings of LoraConfig. Each is an edit of another kind, or a combination that PEFT allows.
KINDS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "dora with rslora": {"use_dora": True, "use_rslora": True, "alpha_pattern": {"q_proj": 3}},
    "norms": {"modules_to_save": ["norm"]},
    "embedding": {"modules_to_save": ["embed_tokens"]},
    "head": {"modules_to_save": ["lm_head"]},
    "embedding and head": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "embedding and head, kept tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "embedding delta": {"target_modules": ["q_proj", "embed_tokens"]},
    "head delta": {"target_modules": ["q_proj", "lm_head"]},
    "embedding and head delta": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "deltas kept tied": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "tokens": {"trainable_token_indices": [1, 5, 250]},
    "tokens of both": {"trainable_token_indices": {"embed_tokens": [1, 5], "lm_head": [2, 5, 7]}},
    "tokens of the head": {"trainable_token_indices": {"lm_head": [2, 5, 7]}},
    "dora and norms": {"use_dora": True, "modules_to_save": ["norm"]},
    "dora, rows, norms": {"use_dora": True, "modules_to_save": ["norm"], "trainable_token_indices": [3, 17]},
}
# What a linear layer trained as a whole is: only a merged model holds it.
LINEAR = {"target_modules": ["v_proj"], "modules_to_save": ["q_proj"]}


def save_trained(base: Path, directory: Path, *, rows: int | None = None, **settings: Any) -> Path:
    """Everything that the settings make trainable is moved. `rows`: the vocabulary is resized before."""
    torch.manual_seed(13)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        if rows:
            model.resize_token_embeddings(rows, mean_resizing=False)
        config = {"r": 8, "lora_alpha": 16, "target_modules": parts.LINEARS, "task_type": "CAUSAL_LM", **settings}
        adapted = get_peft_model(model, LoraConfig(**config))
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                parameter.data += _step(name, parameter)
        adapted.save_pretrained(directory, save_embedding_layers=True if rows else "auto")
    (directory / "README.md").unlink(missing_ok=True)
    parts.edit_json(directory / "adapter_config.json", base_model_name_or_path="acme/tiny-llama")
    return directory


def _step(name: str, parameter: torch.Tensor) -> torch.Tensor:
    scale = 0.2 / parameter.shape[-1] ** 0.5 if "lora_B" in name or "lora_embedding_A" in name else 0.05
    return torch.randn_like(parameter) * scale


def resized(model: Any, rows: int | None) -> Any:
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    return model
