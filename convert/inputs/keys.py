"""A key of an adapter file, understood: which module of the base it is about, and what it says of it.

PEFT's own keys, those of the wrappers that trainers leave in them, and torchtune's native ones:

    base_model.model.<module>.lora_A.weight                       half of a pair, also lora_A.<adapter>.weight
    base_model.model.<module>.lora_embedding_A                    half of a pair on an embedding, transposed
    base_model.model.<module>.lora_magnitude_vector               DoRA
    base_model.model.<module>.modules_to_save.weight, .weight     a weight as a whole
    base_model.model.<module>.token_adapter.trainable_tokens_delta   rows of an embedding
    base_model.model.<module>.base_layer.weight                   what lies below an adapter: the base's own weight
    layers.<n>.attn.q_proj.lora_a.weight                          torchtune
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from convert.formats import PEFT_PREFIX


class Part(Enum):
    """What a tensor is to its module."""

    A = "lora_A"
    B = "lora_B"
    EMBEDDING_A = "lora_embedding_A"
    EMBEDDING_B = "lora_embedding_B"
    MAGNITUDE = "lora_magnitude_vector"
    ROWS = "trainable_tokens_delta"
    SAVED = "modules_to_save"
    WEIGHT = "weight"
    BIAS = "bias"
    BELOW = "base_layer"
    IGNORED = "ignored"


@dataclass(frozen=True)
class Key:
    """`native` marks torchtune's own names; `repaired` the keys whose path had to be mended, not only unwrapped."""

    module: str
    part: Part
    native: bool = False
    repaired: bool = False

    @property
    def weight(self) -> str:
        """The name of the base's tensor that a whole weight or a bias stands for."""
        return f"{self.module}.{'bias' if self.part is Part.BIAS else 'weight'}"


# Left by wrappers, in front only.
_PREFIXES = ("module.", PEFT_PREFIX)
# Left by wrappers of single layers, anywhere in a path.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})

_NATIVE = re.compile(
    r"(?:layers\.(?P<layer>\d+)\.(?P<block>attn|mlp)\.(?P<name>\w+)|(?P<head>output))\.lora_(?P<half>[ab])\.weight"
)
_NATIVE_NAMES: Mapping[tuple[str, str], str] = {
    ("attn", "q_proj"): "self_attn.q_proj",
    ("attn", "k_proj"): "self_attn.k_proj",
    ("attn", "v_proj"): "self_attn.v_proj",
    ("attn", "output_proj"): "self_attn.o_proj",
    ("mlp", "w1"): "mlp.gate_proj",
    ("mlp", "w2"): "mlp.down_proj",
    ("mlp", "w3"): "mlp.up_proj",
}
# In adapter_config.json torchtune's names stand alone.
NATIVE_TARGETS: Mapping[str, str] = {
    **{name: hf.rpartition(".")[2] for (_, name), hf in _NATIVE_NAMES.items()},
    "output": "lm_head",
}

_MODULE = r"(?P<module>.+?)"
# The first that matches speaks. `(?:\.\w+)?` is the name PEFT has for the adapter, "default" unless told otherwise.
_SHAPES: tuple[tuple[re.Pattern[str], Part], ...] = (
    (re.compile(rf"{_MODULE}\.lora_A(?:\.\w+)?\.weight"), Part.A),
    (re.compile(rf"{_MODULE}\.lora_B(?:\.\w+)?\.weight"), Part.B),
    (re.compile(rf"{_MODULE}\.lora_embedding_A(?:\.\w+)?"), Part.EMBEDDING_A),
    (re.compile(rf"{_MODULE}\.lora_embedding_B(?:\.\w+)?"), Part.EMBEDDING_B),
    (re.compile(rf"{_MODULE}\.lora_magnitude_vector(?:\.\w+)?(?:\.weight)?"), Part.MAGNITUDE),
    (re.compile(rf"{_MODULE}\.token_adapter\.trainable_tokens_delta(?:\.\w+)?"), Part.ROWS),
    (re.compile(rf"{_MODULE}\.token_adapter\.trainable_tokens_original(?:\.\w+)?"), Part.IGNORED),
    (re.compile(rf"{_MODULE}(?:\.token_adapter)?\.base_layer\.weight"), Part.BELOW),
    (re.compile(rf"{_MODULE}\.original_module\.(?:weight|bias)"), Part.IGNORED),
    # What an NF4 weight below an adapter consists of.
    (re.compile(rf"{_MODULE}\.base_layer\.(?:bias|weight\.\w+)"), Part.IGNORED),
    (re.compile(rf"{_MODULE}\.modules_to_save(?:\.(?!weight$)\w+)?\.weight"), Part.SAVED),
    (re.compile(rf"{_MODULE}\.modules_to_save(?:\.(?!bias$)\w+)?\.bias"), Part.BIAS),
)
# Last, since their patterns would take every other key as well.
_PLAIN: tuple[tuple[re.Pattern[str], Part], ...] = (
    (re.compile(rf"{_MODULE}\.weight"), Part.WEIGHT),
    (re.compile(rf"{_MODULE}\.bias"), Part.BIAS),
)
_ADAPTER_WORDS = re.compile(r"lora_|ia3_|oft_|hada_|lokr_|vera_|boft_|adapter|prompt|modules_to_save|base_layer")

# Why a key is none of these.
_REASONS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"lora_[AB].*\.bias$"), "a LoRA bias: train with lora_bias=False"),
    (re.compile(r"^layers\.\d+\.attn\.\w+\.magnitude$|^layers\.\d+\.mlp\.\w+\.magnitude$"), "torchtune's DoRA"),
    (re.compile(r"modules_to_save"), "a part of a whole module that is neither its weight nor its bias"),
)
_UNKNOWN = "not a LoRA weight of any layout known here: save the adapter with PEFT's save_pretrained"


def parse(key: str) -> Key | None:
    """None for a key that is none of the above; `reason` says why."""
    plain = without_wrappers(key)
    if native := _NATIVE.fullmatch(plain):
        return _native(native)
    for pattern, part in _SHAPES:
        if match := pattern.fullmatch(plain):
            module = in_model(match["module"])
            return Key(module, part, repaired=module != match["module"])
    if _ADAPTER_WORDS.search(plain):
        return None
    for pattern, part in _PLAIN:
        if match := pattern.fullmatch(plain):
            module = in_model(match["module"])
            return Key(module, part, repaired=module != match["module"])
    return None


def reason(key: str) -> str:
    """Why `parse` gives None."""
    plain = without_wrappers(key)
    return next((why for pattern, why in _REASONS if pattern.search(plain)), _UNKNOWN)


def without_wrappers(key: str) -> str:
    """The key without what data parallelism, compilation, FSDP and PEFT put around the model."""
    key = ".".join(part for part in key.split(".") if part not in _WRAPPERS)
    for prefix in _PREFIXES:
        key = key.removeprefix(prefix)
    return key


def in_model(module: str) -> str:
    """The path as a causal language model has it: one `model.` in front of the layers, none before the head.

    Two stand there where the model was wrapped once more; none where the adapter was trained on the headless model.
    """
    inner = module
    while inner.startswith("model."):
        inner = inner.removeprefix("model.")
    if re.match(r"(?:layers\.\d+\.|embed_tokens$|norm$)", inner):
        return f"model.{inner}"
    return inner if inner == "lm_head" else module


def _native(match: re.Match[str]) -> Key | None:
    part = Part.A if match["half"] == "a" else Part.B
    if match["head"]:
        return Key("lm_head", part, native=True)
    name = _NATIVE_NAMES.get((match["block"], match["name"]))
    return Key(f"model.layers.{match['layer']}.{name}", part, native=True) if name else None
