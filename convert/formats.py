"""What trainers and model libraries write, as tables: names to strip, settings to refuse, files to copy.

Sources: peft 0.21 `LoraConfig` and `save_pretrained`, transformers 5 `Trainer`, ms-swift 3, axolotl,
LLaMA-Factory and unsloth output directories; the module names are those of transformers' Llama.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_STEM = "adapter_model"
MODEL_STEM = "model"
PEFT_PREFIX = "base_model.model."

# Left by wrappers, in front only.
_PREFIXES = ("module.", PEFT_PREFIX)
# Left by wrappers of single layers, anywhere in a path.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_LORA_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<half>[AB])(?:\.default)?\.weight")


@dataclass(frozen=True)
class LoraKey:
    """A key of an adapter file, understood: the module's path in the base model, and A or B."""

    module: str
    half: str

    @classmethod
    def parse(cls, key: str) -> LoraKey | None:
        """None for a key that isn't half of a LoRA pair."""
        match = _LORA_KEY.fullmatch(without_wrappers(key))
        return cls(match["module"], match["half"]) if match else None

    def __str__(self) -> str:
        """As PEFT saves it and vLLM reads it."""
        return f"{PEFT_PREFIX}{self.module}.lora_{self.half}.weight"


def without_wrappers(key: str) -> str:
    """The key as the plain model names it."""
    key = ".".join(part for part in key.split(".") if part not in _WRAPPERS)
    for prefix in _PREFIXES:
        key = key.removeprefix(prefix)
    return key


# Keys that mean more than LoRA on linear layers -> what they are and what to do. The first match speaks.
UNSUPPORTED_KEYS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"lora_magnitude_vector"), "DoRA magnitudes: train with use_dora=False"),
    (re.compile(r"lora_embedding_[AB]"), "LoRA on embeddings: train without embed_tokens in target_modules"),
    (re.compile(r"trainable_tokens"), "trainable tokens: train without trainable_token_indices"),
    (re.compile(r"modules_to_save"), "a whole module trained beside LoRA: train without modules_to_save"),
    (re.compile(r"lora_[AB].*\.bias$"), "a LoRA bias: train with lora_bias=False"),
    (
        re.compile(r"base_layer|embed_tokens|lm_head"),
        "whole weights of the base: save with save_embedding_layers=False",
    ),
    (re.compile(r"\.bias$"), "a trained bias: train with bias='none'"),
)
UNKNOWN_KEY = "not a LoRA weight of any layout known here"


@dataclass(frozen=True)
class Setting:
    """A key of adapter_config.json that changes the function in a way no route here can follow."""

    neutral: tuple[object, ...]
    why: str


_OFF: tuple[object, ...] = (None, False)
UNSUPPORTED_SETTINGS: Mapping[str, Setting] = {
    "use_dora": Setting(_OFF, "DoRA is not served on 4-bit bases: train with use_dora=False"),
    "bias": Setting((None, "none"), "trained biases have no place in a served adapter: train with bias='none'"),
    "lora_bias": Setting(_OFF, "a bias in LoRA is not served: train with lora_bias=False"),
    "modules_to_save": Setting((None, []), "whole modules can't be hot-swapped: train without modules_to_save"),
    "trainable_token_indices": Setting((None, [], {}), "trained tokens are not served: train without them"),
    "target_parameters": Setting((None, []), "LoRA on bare parameters is not served: use target_modules"),
    "layer_replication": Setting((None, []), "replicated layers are another model: train without them"),
    "fan_in_fan_out": Setting(_OFF, "weights stored transposed (GPT-2) are not supported"),
    "alora_invocation_tokens": Setting((None, []), "aLoRA is not supported: train plain LoRA"),
    "use_qalora": Setting(_OFF, "QALoRA is not supported: train plain LoRA"),
    "use_bdlora": Setting(_OFF, "block-diagonal LoRA is not supported: train plain LoRA"),
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
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_alpha",
        "lora_dropout",
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "use_rslora",
        "velora_config",
    }
)

# These start from W alone. The others (pissa, olora, corda, loftq, lora_ga) change the base weights first,
# and the adapter is wrong on the base that everybody else has.
PLAIN_INITS: tuple[object, ...] = (None, True, False, "gaussian", "eva", "orthogonal")

# File beside the adapter -> trainer, most telling first. Without any of them it is plain PEFT.
LAYOUT_MARKERS: tuple[tuple[str, str], ...] = (
    ("args.json", "ms-swift"),
    ("additional_config.json", "ms-swift"),
    ("training_args.yaml", "llama-factory"),
    ("llamaboard_config.yaml", "llama-factory"),
    ("trainer_log.jsonl", "llama-factory"),
)


def layout_of(root: Path, base_name: str) -> str:
    """The trainer whose layout a checkpoint directory has."""
    for marker, layout in LAYOUT_MARKERS:
        if (root / marker).is_file():
            return layout
    if "load_in_4bit:" in model_card(root):
        return "axolotl" if "axolotl" in model_card(root) else "peft"
    return "unsloth" if base_name.startswith("unsloth/") else "peft"


def model_card(root: Path) -> str:
    """README.md of a checkpoint; empty when there is none."""
    try:
        return (root / "README.md").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


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
