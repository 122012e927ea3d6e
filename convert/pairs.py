"""A module's two halves of low rank, and the factor of their product."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from convert import lora
from convert.formats import ADAPTER_CONFIG
from convert.keys import Key, Part
from convert.tensors import TensorSpec

HALVES = (Part.A, Part.B, Part.EMBEDDING_A, Part.EMBEDDING_B)

# Architectures whose q and k rows torchtune keeps in the order of interleaved rotation, transformers by halves.
_INTERLEAVED = frozenset({"llama", "mistral"})
_ROTATED = re.compile(r".+\.self_attn\.[qk]_proj")


@dataclass(frozen=True)
class LoraPair:
    """The two halves of one module's delta; `scaling` is the factor of B·A.

    `transposed`: an embedding's pair, stored as A (r, rows) and B (columns, r). `magnitude`: of DoRA, (out,).
    `head_dim`: B's rows are ordered for interleaved rotation in heads of that size.
    """

    module: str
    a: TensorSpec
    b: TensorSpec
    alpha: float
    scaling: float
    magnitude: TensorSpec | None = None
    transposed: bool = False
    head_dim: int | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[1] if self.transposed else self.a.shape[0]

    @property
    def in_features(self) -> int:
        return self.a.shape[0] if self.transposed else self.a.shape[1]

    @property
    def out_features(self) -> int:
        return self.b.shape[1] if self.transposed else self.b.shape[0]

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        return (self.a, self.b, self.magnitude) if self.magnitude else (self.a, self.b)


def pair_of(
    module: str,
    parts: Mapping[Part, tuple[Key, TensorSpec]],
    config: Mapping[str, Any],
    model: Mapping[str, Any],
) -> LoraPair | str:
    """The module's pair, or what is wrong with it."""
    halves = {part: spec for part, (_, spec) in parts.items() if part in HALVES}
    transposed = Part.EMBEDDING_A in halves or Part.EMBEDDING_B in halves
    wanted = HALVES[2:] if transposed else HALVES[:2]
    if missing := [part for part in wanted if part not in halves]:
        return f"{module}: {missing[0].value} is missing, half a pair has no meaning: save the adapter again"
    a, b = halves[wanted[0]], halves[wanted[1]]
    if a.shape[0] != b.shape[1]:
        return f"{module}: {wanted[0].value} has rank {a.shape[0]}, {wanted[1].value} rank {b.shape[1]}"
    scaled = _scale(module, a.shape[0], config)
    if isinstance(scaled, str):
        return scaled
    magnitude = parts[Part.MAGNITUDE][1] if Part.MAGNITUDE in parts else None
    if transposed:
        return LoraPair(module, b, a, *scaled, magnitude=magnitude, transposed=True)
    pair = LoraPair(module, a, b, *scaled, magnitude=magnitude)
    native = any(key.native for key, _ in parts.values())
    return _in_heads(pair, model) if native and _ROTATED.fullmatch(module) else pair


def _scale(module: str, stored_rank: int, config: Mapping[str, Any]) -> tuple[float, float] | str:
    """Alpha and the factor of B·A, or what is wrong with them."""
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(name), dict | None):
            return f"{module}: {name} is {config[name]!r}, not an object of patterns: write the one of the training run"
    try:
        rank = _of_module(config.get("rank_pattern"), module, config.get("r"))
        alpha = _of_module(config.get("alpha_pattern"), module, config.get("lora_alpha"))
    except re.error as cause:
        return f"{module}: rank_pattern or alpha_pattern holds no valid pattern ({cause})"
    if rank != stored_rank:
        return (
            f"{module}: {ADAPTER_CONFIG} says rank {rank!r}, the weights have {stored_rank}, so the scale is unknown: "
            f"put the {ADAPTER_CONFIG} of this training run beside them"
        )
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        return f"{module}: lora_alpha is {alpha!r}, not a number: write the one of the training run"
    return alpha, lora.scaling(alpha, stored_rank, rslora=bool(config.get("use_rslora")))


def _of_module(patterns: object, module: str, default: object) -> Any:
    """PEFT's rule: the first pattern that matches the end of the path, from a dot on."""
    if isinstance(patterns, dict):
        for pattern, value in patterns.items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
    return default


def _in_heads(pair: LoraPair, model: Mapping[str, Any]) -> LoraPair | str:
    """torchtune's q and k: the base's config says how many rows belong together."""
    if not model:
        return (
            f"{pair.module}: torchtune's own names need config.json of the base model, which says how its rows are "
            "ordered: copy it beside the adapter"
        )
    if model.get("model_type") not in _INTERLEAVED:
        return pair
    heads, hidden = model.get("num_attention_heads"), model.get("hidden_size")
    size = model.get("head_dim")
    if size is None and type(heads) is int and type(hidden) is int and heads > 0:
        size = hidden // heads
    if type(size) is not int or size < 2 or size % 2 or pair.out_features % size:
        return f"{pair.module}: {pair.out_features} rows are no whole number of heads of {size!r} (config.json)"
    return replace(pair, head_dim=size)
