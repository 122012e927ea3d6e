"""What trainers and model libraries write, as tables: settings to refuse, files to copy, names of weights.

Sources: peft 0.21 `LoraConfig` and `save_pretrained`, ms-swift 2 to 4; the module names are those of
transformers' Llama.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_STEM = "adapter_model"
MODEL_STEM = "model"
PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class LoraKey:
    """A key of half a LoRA pair on a linear layer: the module's path in the base model, and A or B."""

    module: str
    half: str

    def __str__(self) -> str:
        """As PEFT saves it and vLLM reads it."""
        return f"{PEFT_PREFIX}{self.module}.lora_{self.half}.weight"


@dataclass(frozen=True)
class Setting:
    """A key of adapter_config.json that changes the function in a way no route here can follow."""

    neutral: tuple[object, ...]
    why: str


_OFF: tuple[object, ...] = (None, False)
UNSUPPORTED_SETTINGS: Mapping[str, Setting] = {
    "lora_bias": Setting(_OFF, "a bias in LoRA is not served: train with lora_bias=False"),
    "target_parameters": Setting((None, []), "LoRA on bare parameters is not served: use target_modules"),
    "layer_replication": Setting((None, []), "replicated layers are another model: train without them"),
    "fan_in_fan_out": Setting(_OFF, "weights stored transposed (GPT-2) are not supported"),
    "alora_invocation_tokens": Setting((None, []), "aLoRA is not supported: train plain LoRA"),
    "use_qalora": Setting(_OFF, "QALoRA is not supported: train plain LoRA"),
    "use_qa_lora": Setting(_OFF, "QALoRA is not supported: train plain LoRA"),
    "use_bdlora": Setting(_OFF, "block-diagonal LoRA is not supported: train plain LoRA"),
    "use_merged_linear": Setting(_OFF, "LoRA on parts of a fused layer is not supported: target the single layers"),
    "enable_lora": Setting((None, []), "LoRA on parts of a fused layer is not supported: target the single layers"),
    "arrow_config": Setting(_OFF, "Arrow routing is not supported: convert the single adapters"),
    "kasa_config": Setting(_OFF, "KaSA is not supported: train plain LoRA"),
    "monteclora_config": Setting(_OFF, "MonteCLoRA is not supported: train plain LoRA"),
}

# Settings of training, or of how PEFT finds the modules: the tensors say the rest.
HARMLESS_SETTINGS = frozenset(
    {
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "group_size",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_alpha",
        "lora_dropout",
        "lora_dtype",
        "lora_ga_config",
        "lorap_emb_lr",
        "lorap_lr_ratio",
        "megatron_config",
        "megatron_core",
        "model_key_mapping",
        "modules_to_save",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "runtime_config",
        "swift_type",
        "target_modules",
        "task_type",
        "trainable_token_indices",
        "use_dora",
        "use_rslora",
        "velora_config",
    }
)

# These start from W alone. The others (pissa, olora, corda, loftq, lora_ga) change the base weights first,
# and the adapter is wrong on the base that everybody else has.
PLAIN_INITS: tuple[object, ...] = (None, True, False, "gaussian", "eva", "mica", "orthogonal")

# What vLLM can be told of an adapter's rank; a smaller one is filled up with zeros.
SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
CHAT_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
GENERATION_FILES = ("generation_config.json",)
# One of these is a tokenizer; the other files only accompany it.
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")

# Llama's structure, which Mistral and Qwen2 share: the linear layers and what lies between them.
LAYER_LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
LAYER_LINEAR = re.compile(rf"model\.layers\.(?P<layer>\d+)\.(?:{'|'.join(map(re.escape, LAYER_LINEARS))})")
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head"
OTHER_WEIGHTS = re.compile(
    r"model\.(?:norm\.weight|layers\.\d+\.(?:\w+layernorm\.weight|self_attn\.(?:[qk]_norm\.weight|"
    r"rotary_emb\.inv_freq)|(?:self_attn|mlp)\.\w+_proj\.bias))"
)
