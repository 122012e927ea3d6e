"""Parses the keys of an adapter file: which module of the base model a tensor belongs to, and what it is there.

The keys are PEFT's (`get_peft_model_state_dict` of peft 0.21), with what wrappers of trainers add to them, and those of
torchtune:

    base_model.model.<module>.lora_A.weight                       A of a linear layer, also lora_A.<adapter>.weight
    base_model.model.<module>.lora_embedding_A                    A of an embedding, stored transposed
    base_model.model.<module>.lora_magnitude_vector               the magnitude of DoRA
    base_model.model.<module>.modules_to_save.weight, .weight     a complete weight
    base_model.model.<module>.token_adapter.trainable_tokens_delta   trained rows of an embedding
    base_model.model.<module>.base_layer.weight, .bias            the base model's own weight of an adapted module
    layers.<n>.attn.q_proj.lora_a.weight                          torchtune
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Literal

PEFT_PREFIX = "base_model.model."


def lora_key(module: str, matrix: Literal["A", "B"]) -> str:
    """The key of A or B of a linear layer, as PEFT saves it and vLLM reads it."""
    return f"{PEFT_PREFIX}{module}.lora_{matrix}.weight"


class Part(Enum):
    """The role of a tensor in its module."""

    A = "lora_A"
    B = "lora_B"
    EMBEDDING_A = "lora_embedding_A"
    EMBEDDING_B = "lora_embedding_B"
    MAGNITUDE = "lora_magnitude_vector"
    TRAINED_ROWS = "trainable_tokens_delta"
    SAVED = "modules_to_save"
    WEIGHT = "weight"
    BIAS = "bias"
    BASE_LAYER = "base_layer"
    BASE_LAYER_PIECE = "a piece of a quantized base_layer"
    UNREAD = "unread"


@dataclass(frozen=True)
class Key:
    """A parsed key.

    `trained_path`: the path of the module in the model that was trained, which PEFT's patterns are matched against.
    `is_torchtune`: the key is one of torchtune's names.
    """

    module: str
    part: Part
    trained_path: str
    is_torchtune: bool = False

    @property
    def is_corrected(self) -> bool:
        """Whether the path differs from that in the causal language model; removing a wrapper is no correction."""
        return self.trained_path not in (self.module, _before_transformers_4_52(self.module))

    @property
    def weight(self) -> str:
        """The name of the base model's tensor that a saved weight or bias replaces."""
        return f"{self.module}.{'bias' if self.part is Part.BIAS else 'weight'}"


# Added by wrappers of the whole model, at the start of a key.
_PREFIXES = ("module.", PEFT_PREFIX)
# Added by wrappers of single layers, anywhere in a key.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})

_TORCHTUNE_KEY = re.compile(
    r"(?:layers\.(?P<layer>\d+)\.(?P<block>attn|mlp)\.(?P<name>\w+)|(?P<head>output))\.lora_(?P<matrix>[ab])\.weight"
)
_TORCHTUNE_NAMES: Mapping[tuple[str, str], str] = {
    ("attn", "q_proj"): "self_attn.q_proj",
    ("attn", "k_proj"): "self_attn.k_proj",
    ("attn", "v_proj"): "self_attn.v_proj",
    ("attn", "output_proj"): "self_attn.o_proj",
    ("mlp", "w1"): "mlp.gate_proj",
    ("mlp", "w2"): "mlp.down_proj",
    ("mlp", "w3"): "mlp.up_proj",
}
# torchtune's names of target modules in adapter_config.json, and PEFT's.
TORCHTUNE_TARGETS: Mapping[str, str] = {
    **{name: hf.rpartition(".")[2] for (_, name), hf in _TORCHTUNE_NAMES.items()},
    "output": "lm_head",
}

_MODULE = r"(?P<module>.+?)"
# PEFT's name of the adapter, by default "default", which may hold anything but a dot.
_NAME = r"(?:\.[^.]+)?"
# The first pattern that matches decides.
_PEFT_KEYS: tuple[tuple[re.Pattern[str], Part], ...] = (
    (re.compile(rf"{_MODULE}\.lora_A{_NAME}\.weight"), Part.A),
    (re.compile(rf"{_MODULE}\.lora_B{_NAME}\.weight"), Part.B),
    (re.compile(rf"{_MODULE}\.lora_embedding_A{_NAME}"), Part.EMBEDDING_A),
    (re.compile(rf"{_MODULE}\.lora_embedding_B{_NAME}"), Part.EMBEDDING_B),
    (re.compile(rf"{_MODULE}\.lora_magnitude_vector{_NAME}(?:\.weight)?"), Part.MAGNITUDE),
    (re.compile(rf"{_MODULE}\.token_adapter\.trainable_tokens_delta{_NAME}"), Part.TRAINED_ROWS),
    (re.compile(rf"{_MODULE}\.token_adapter\.trainable_tokens_original{_NAME}"), Part.UNREAD),
    (re.compile(rf"{_MODULE}(?:\.token_adapter)?\.base_layer\.weight"), Part.BASE_LAYER),
    (re.compile(rf"{_MODULE}(?:\.token_adapter)?\.base_layer\.bias"), Part.BIAS),
    (re.compile(rf"{_MODULE}\.base_layer\.weight\.[\w.]+"), Part.BASE_LAYER_PIECE),
    # The weight that a trained copy stands in for: the function as trained never reads it.
    (re.compile(rf"{_MODULE}\.original_module\.(?:weight|bias)"), Part.UNREAD),
    (re.compile(rf"{_MODULE}\.modules_to_save(?:\.(?!weight$)[^.]+)?\.weight"), Part.SAVED),
    (re.compile(rf"{_MODULE}\.modules_to_save(?:\.(?!bias$)[^.]+)?\.bias"), Part.BIAS),
)
# These patterns match nearly every key, so they are tried last, and only for keys without one of _ADAPTER_WORDS.
_PLAIN_KEYS: tuple[tuple[re.Pattern[str], Part], ...] = (
    (re.compile(rf"{_MODULE}\.weight"), Part.WEIGHT),
    (re.compile(rf"{_MODULE}\.bias"), Part.BIAS),
)
_ADAPTER_WORDS = re.compile(
    r"(?<![a-z])(?:lora_|ia3_|oft_|hada_|lokr_|vera_|boft_)|adapter|prompt|modules_to_save|base_layer"
)

# Explanations of keys that no pattern above matches.
_UNKNOWN_KEYS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"lora_[AB].*\.bias$"), "a LoRA bias: train with lora_bias=False"),
    (re.compile(r"^layers\.\d+\.attn\.\w+\.magnitude$|^layers\.\d+\.mlp\.\w+\.magnitude$"), "torchtune's DoRA"),
    (re.compile(r"modules_to_save"), "a part of a whole module that is neither its weight nor its bias"),
)
_UNKNOWN = "not a LoRA weight of any layout known here: save the adapter with PEFT's save_pretrained"


def parse(key: str) -> Key | None:
    """The module and the role of a tensor by its key; None for an unknown key, which `why_unknown` explains."""
    plain = strip_wrappers(key)
    if match := _TORCHTUNE_KEY.fullmatch(plain):
        return _torchtune_key(match)
    patterns = _PEFT_KEYS if _ADAPTER_WORDS.search(plain) else _PEFT_KEYS + _PLAIN_KEYS
    for pattern, part in patterns:
        if match := pattern.fullmatch(plain):
            return Key(canonical_module(match["module"]), part, match["module"])
    return None


def why_unknown(key: str) -> str:
    """Why `parse` returns None for a key."""
    plain = strip_wrappers(key)
    return next((why for pattern, why in _UNKNOWN_KEYS if pattern.search(plain)), _UNKNOWN)


def strip_wrappers(key: str) -> str:
    """The key without the parts that data parallelism, torch.compile, FSDP and PEFT add to it."""
    key = ".".join(part for part in key.split(".") if part not in _WRAPPERS)
    for prefix in _PREFIXES:
        key = key.removeprefix(prefix)
    return key


def canonical_module(module: str) -> str:
    """The path of a module in transformers' causal language model: `model.layers…`, but `lm_head`; in a multimodal one
    `model.language_model.layers…`.

    A file has `model.model.` where the model was wrapped once more, and no `model.` where the adapter was trained on
    the model without its head.
    """
    inner = re.sub(r"^(?:(?:model|language_model)\.)+", "", module)
    around = module.removesuffix(inner).split(".")
    if re.match(r"(?:layers\.\d+\.|embed_tokens$|norm$)", inner):
        return f"model.language_model.{inner}" if "language_model" in around else f"model.{inner}"
    return inner if inner == "lm_head" else module


def _before_transformers_4_52(module: str) -> str:
    """The path of a module of a multimodal model in older versions of transformers. vLLM reads it, too."""
    if module == "lm_head":
        return "language_model.lm_head"
    return re.sub(r"^model\.language_model\.", "language_model.model.", module)


def _torchtune_key(match: re.Match[str]) -> Key | None:
    part = Part.A if match["matrix"] == "a" else Part.B
    if match["head"]:
        return Key("lm_head", part, "lm_head", is_torchtune=True)
    name = _TORCHTUNE_NAMES.get((match["block"], match["name"]))
    module = f"model.layers.{match['layer']}.{name}"
    return Key(module, part, module, is_torchtune=True) if name else None
