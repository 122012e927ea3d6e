"""The families of models that are converted: how each names the weights of its decoder, as transformers does.

A base is of the family that `model_type` of its config.json names. An adapter is read before its base is known, so what
is asked of its modules there holds for any family (`is_layer_linear`, `EMBEDDING_MODULES`, `HEAD_MODULES`).

What a family does not name here comes from transformers itself: its forward, its logits, and the settings that
config.json leaves out. docs/how-to/add-an-architecture.md says how to add one.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from convert.errors import ArchitectureUnknown

_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_NORMS = ("input_layernorm", "post_attention_layernorm")
_FEEDFORWARD_NORMS = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")


@dataclass(frozen=True)
class Architecture:
    """The names of a family's weights. The defaults are Llama's.

    `linears`: the linear layers of one decoder layer, all of which it must have. `norms`: its other modules with a
    weight, which it may have. `fused`: linear layers of which others keep the parts, by name. `rotated`: the linear
    layers whose rows torchtune orders differently: those of queries and keys, where torchtune turns pairs of rows that
    lie side by side.

    Of a model that also sees, `other_parts` are the modules that are not its language model, and `older_names` are
    prefixes of the language model's names, each with the one that it has in files of transformers before 4.52. There
    the other parts have their names without `model.`.
    """

    linears: tuple[str, ...] = (*_ATTENTION, *_MLP)
    norms: tuple[str, ...] = _NORMS
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    rotated: tuple[str, ...] = ()
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm.weight"
    head: str = "lm_head"
    other_parts: tuple[str, ...] = ()
    older_names: Mapping[str, str] = field(default_factory=dict)

    @property
    def embedding_module(self) -> str:
        return self.embedding.removesuffix(".weight")

    @property
    def head_weight(self) -> str:
        return f"{self.head}.weight"

    def layer_of(self, module: str) -> int | None:
        """The decoder layer that `module` is a linear layer of; None for any other module."""
        match = self._linear.fullmatch(module)
        return int(match["layer"]) if match else None

    def linears_of(self, layers: int) -> list[str]:
        """Every linear layer of a model with that many decoder layers."""
        return [f"{self.layers}.{layer}.{name}" for layer in range(layers) for name in self.linears]

    def has_other_weight(self, name: str) -> bool:
        """Whether a tensor of the model that belongs to no linear layer's weight may have this name."""
        return name in (self.embedding, self.final_norm) or bool(self._other.fullmatch(name))

    def is_other_part(self, name: str) -> bool:
        """Whether a module or tensor is one of `other_parts`, or in one, by its name in the model or in older files."""
        plain = name.removeprefix("model.")
        return any(f"{plain}.".startswith(f"{part.removeprefix('model.')}.") for part in self.other_parts)

    def file_prefixes(self, names: Collection[str]) -> Mapping[str, str]:
        """Prefixes of names here with those that they have in files with tensors of these names; empty if the same."""
        return self.older_names if with_prefix(self.embedding, self.older_names) in names else {}

    def own_name(self, name: str) -> str:
        """The name here of a module or tensor of a decoder that has its name in any family; others are unchanged."""
        for prefix in _PREFIXES:
            inner = name.removeprefix(prefix)
            if inner != name and _IN_DECODER.match(inner):
                return f"{_decoder_prefix(self)}{inner}"
        return name

    def fused_for(self, module: str) -> str | None:
        """The fused layer that holds `module`, which is a layer by itself in other families; None where none does."""
        block, _, part = module.rpartition(".")
        return next((f"{block}.{_last(fused)}" for fused, parts in self.fused.items() if part in parts), None)

    @cached_property
    def _linear(self) -> re.Pattern[str]:
        return re.compile(rf"{re.escape(self.layers)}\.(?P<layer>\d+)\.(?:{_any_of(self.linears)})")

    @cached_property
    def _other(self) -> re.Pattern[str]:
        # Llama's first checkpoints store the frequencies of the rotary embedding too.
        names = rf"(?:{_any_of(self.norms)})\.weight|(?:{_any_of(self.linears)})\.bias|self_attn\.rotary_emb\.inv_freq"
        return re.compile(rf"{re.escape(self.layers)}\.\d+\.(?:{names})")


def _any_of(names: tuple[str, ...]) -> str:
    return "|".join(map(re.escape, names))


def with_prefix(name: str, prefixes: Mapping[str, str]) -> str:
    """The name with another prefix, if it has one of `prefixes`."""
    prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
    return prefixes.get(prefix, "") + name.removeprefix(prefix)


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _decoder_prefix(family: Architecture) -> str:
    return family.layers.removesuffix("layers")


# What a decoder is made of, by its names there.
_IN_DECODER = re.compile(r"layers\.\d+\.|(?:embed_tokens|norm)(?:\.|$)")


_LLAMA = Architecture()
_ROTATED = replace(_LLAMA, rotated=_ATTENTION[:2])
_QWEN3 = replace(_LLAMA, norms=(*_NORMS, *_HEAD_NORMS))
_GEMMA2 = replace(_LLAMA, norms=(*_NORMS, *_FEEDFORWARD_NORMS))
_GEMMA3 = replace(_LLAMA, norms=(*_NORMS, *_FEEDFORWARD_NORMS, *_HEAD_NORMS))
_COHERE = replace(_LLAMA, norms=("input_layernorm", *_HEAD_NORMS))  # one norm for both halves of a layer
_OLMO2 = replace(_LLAMA, norms=("post_attention_layernorm", "post_feedforward_layernorm", *_HEAD_NORMS))

_FUSED = {"self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"), "mlp.gate_up_proj": ("gate_proj", "up_proj")}
_PHI3 = Architecture(linears=("self_attn.qkv_proj", _ATTENTION[-1], "mlp.gate_up_proj", _MLP[-1]), fused=_FUSED)

_MULTIMODAL = Architecture(
    layers="model.language_model.layers",
    embedding="model.language_model.embed_tokens.weight",
    final_norm="model.language_model.norm.weight",
    other_parts=("model.vision_tower", "model.multi_modal_projector"),
    older_names={"model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head."},
)
_QWEN_VL = replace(_MULTIMODAL, other_parts=("model.visual",), older_names={"model.language_model.": "model."})

# By model_type of config.json, in the order of the documentation.
FAMILIES: Mapping[str, Architecture] = {
    "llama": _ROTATED,
    "mistral": _ROTATED,
    "ministral": _LLAMA,
    "ministral3": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _QWEN3,
    "gemma": _LLAMA,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA3,
    "granite": _LLAMA,
    "cohere": _COHERE,
    "cohere2": _COHERE,
    "smollm3": _LLAMA,
    "olmo2": _OLMO2,
    "olmo3": _OLMO2,
    "exaone4": _OLMO2,
    "ernie4_5": _LLAMA,
    "seed_oss": _LLAMA,
    "phi3": _PHI3,
    "gemma3": replace(_MULTIMODAL, norms=_GEMMA3.norms),
    "mistral3": _MULTIMODAL,
    "qwen2_5_vl": _QWEN_VL,
}

_MIXTURE = (
    "It is a mixture of experts: transformers keeps the experts of a layer in one tensor, and only linear layers are "
    "read here"
)
# Why well-known families can't be added as an entry above.
_REFUSED: Mapping[str, str] = {
    "mixtral": _MIXTURE,
    "qwen2_moe": _MIXTURE,
    "qwen3_moe": _MIXTURE,
    "gpt_oss": _MIXTURE,
    "mllama": (
        "Some of its decoder layers attend to the image and are left out where there is none, so that their linear "
        "layers are others than those of the rest"
    ),
}

EMBEDDING_MODULES = frozenset(family.embedding_module for family in FAMILIES.values())
HEAD_MODULES = frozenset(family.head for family in FAMILIES.values())
# Each name once, in the order of a layer.
LINEARS = tuple(dict.fromkeys(name for family in FAMILIES.values() for name in family.linears))
ROTATED = frozenset(name for family in FAMILIES.values() for name in family.rotated)


def architecture_of(config: Mapping[str, Any], root: Path) -> Architecture:
    """The family of a model directory, by its config.json. Raises ArchitectureUnknown."""
    model_type = config["model_type"]
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    named = f"{root} is of the family {model_type!r} (model_type of config.json)"
    if reason := _REFUSED.get(model_type):
        raise ArchitectureUnknown(
            f"{named}, which is not converted. {reason}. Converted are {', '.join(FAMILIES)}. Fine-tune one of these."
        )
    raise ArchitectureUnknown(
        f"{named}, whose weights have no names here. "
        f"Converted are {', '.join(FAMILIES)}. Give a base of one of these, or add the family, which is one entry "
        "of convert/inputs/architecture.py: docs/how-to/add-an-architecture.md"
    )


def is_other_part(module: str) -> bool:
    """Whether a module is a part of a multimodal model that is not its language model, in any family."""
    return any(family.is_other_part(module) for family in FAMILIES.values())


def is_layer_linear(module: str) -> bool:
    """Whether a module is a linear layer of a decoder layer in any family."""
    return name_in_layer(module) is not None


def name_in_layer(module: str) -> tuple[int, str] | None:
    """The decoder layer of a linear layer, and its name there, in any family; None for another module."""
    for family in _LAYOUTS:
        if (layer := family.layer_of(module)) is not None:
            return layer, module.removeprefix(f"{family.layers}.{layer}.")
    return None


# The longest prefix first: the others are prefixes of it.
_PREFIXES = tuple(sorted({_decoder_prefix(family) for family in FAMILIES.values()}, key=len, reverse=True))
# Families differ more in norms than in linear layers.
_LAYOUTS = tuple({(family.layers, family.linears): family for family in FAMILIES.values()}.values())
