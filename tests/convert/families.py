"""Tiny random models of every family that is converted, made by transformers, and adapters of them, made by PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

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
    "gemma3": {**HEADS, "final_logit_softcapping": None},
    "mistral3": {"model_type": "mistral", "head_dim": 16},
    "qwen2_5_vl": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
}
_VISION = {"hidden_size": 32, "intermediate_size": 64, "patch_size": 14}
_LAYERS = {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
# The settings of a multimodal family beside its language model, which are those of FAMILIES.
MULTIMODAL: dict[str, dict[str, Any]] = {
    "gemma3": {"vision_config": {**_VISION, **_LAYERS}, "mm_tokens_per_image": 4, "image_token_index": 270},
    "mistral3": {
        "vision_config": {"model_type": "pixtral", "head_dim": 16, **_VISION, **_LAYERS},
        "image_token_index": 270,
        "tie_word_embeddings": False,
    },
    "qwen2_5_vl": {
        "vision_config": {**_VISION, "depth": 1, "num_heads": 2, "out_hidden_size": 64, "fullatt_block_indexes": [0]},
        "image_token_id": 270,
        "video_token_id": 271,
        "vision_start_token_id": 268,
        "vision_end_token_id": 269,
    },
}
NOT_LANGUAGE = r".*(vision_tower|multi_modal_projector|visual).*"
WITH_OTHER_LOGITS = ("gemma2", "gemma3_text", "granite", "cohere", "cohere2")


def random_model(family: str, layers: int = 1, dtype: torch.dtype = torch.float32) -> Any:
    """With weights large enough that no distribution is flat, and norms and biases that are not all the same."""
    language = {**SIZES, "num_hidden_layers": layers, **FAMILIES[family]}
    settings = {"text_config": language, **MULTIMODAL[family]} if family in MULTIMODAL else language
    config = AutoConfig.for_model(family, **settings)
    torch.manual_seed(3)
    # Of the implementations only this one caps attention as Gemma 2 was trained.
    model = auto_class(family).from_config(config, dtype=dtype, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def auto_class(family: str) -> Any:
    return AutoModelForImageTextToText if family in MULTIMODAL else AutoModelForCausalLM


def load(directory: Path) -> Any:
    """A model directory in float32, as transformers loads it. Every weight of the model is in it, and no other."""
    model, loading_info = auto_class(AutoConfig.from_pretrained(directory).model_type).from_pretrained(
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
    model = load(base)
    excluded = NOT_LANGUAGE if model.config.model_type in MULTIMODAL else None
    defaults = {"target_modules": "all-linear", "exclude_modules": excluded}
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, **{**defaults, **settings}))
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


def renamed(directory: Path, prefixes: dict[str, str], file: str = "model.safetensors") -> Path:
    """The directory, with other names in its file: the first prefix that a name has is replaced."""
    tensors = {}
    for name, tensor in load_file(directory / file).items():
        old = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
        tensors[prefixes.get(old, "") + name.removeprefix(old)] = tensor
    save_file(tensors, directory / file, {"format": "pt"})
    return directory


def as_trained(base: Path, adapter: Path) -> Any:
    return PeftModel.from_pretrained(load(base), str(adapter)).eval()


def is_language(name: str) -> bool:
    return not name.removeprefix("model.").startswith(("vision_tower.", "multi_modal_projector.", "visual."))
