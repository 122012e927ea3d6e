"""The LoRA weights of one module: where A and B are stored, and the factor of their product."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from convert.artifact.file_names import ADAPTER_CONFIG
from convert.artifact.json_files import shown
from convert.inputs import lora, model_config, patterns
from convert.inputs.architecture import FAMILIES, ROTATED, name_in_layer
from convert.inputs.keys import Key, Part
from convert.inputs.patterns import PatternInvalid, by_pattern, valid_patterns
from convert.safetensors_io.tensors import TensorSpec

_LINEAR_PARTS = (Part.A, Part.B)
_EMBEDDING_PARTS = (Part.EMBEDDING_A, Part.EMBEDDING_B)
# Larger than any alpha of a training, and small enough that its product with A and B is finite in float32.
_MAX_ALPHA = 1e12
LORA_PARTS = _LINEAR_PARTS + _EMBEDDING_PARTS


class LoraWeightsInvalid(Exception):
    """The LoRA weights of a module can't be used. The message says why, and what to do."""


@dataclass(frozen=True)
class LoraWeights:
    """A (r, in) and B (out, r) of one module; `scaling` is the factor of B·A.

    `trained_path`: the path of the module in the model that was trained; `module` is that in the base.
    `magnitude`: DoRA's vector (out,). `transposed`: of an embedding, where the file has A and B transposed. `head_dim`:
    the rows of B are in torchtune's order, in heads of this size.
    """

    module: str
    a: TensorSpec
    b: TensorSpec
    alpha: float
    scaling: float
    magnitude: TensorSpec | None = None
    transposed: bool = False
    head_dim: int | None = None
    trained_path: str = ""

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
        return (self.a, self.b) if self.magnitude is None else (self.a, self.b, self.magnitude)


def lora_weights_of(
    module: str,
    parts: Mapping[Part, tuple[Key, TensorSpec]],
    adapter_config: Mapping[str, Any],
    base_config: Mapping[str, Any],
) -> LoraWeights:
    """The LoRA weights among the parts of a module. Raises LoraWeightsInvalid."""
    transposed = any(part in parts for part in _EMBEDDING_PARTS)
    wanted = _EMBEDDING_PARTS if transposed else _LINEAR_PARTS
    if missing := [part.value for part in wanted if part not in parts]:
        raise LoraWeightsInvalid(f"{module}: {missing[0]} is missing; LoRA needs both A and B: save the adapter again")
    (key, a), (_, b) = (parts[part] for part in wanted)
    if a.shape[0] != b.shape[1]:
        raise LoraWeightsInvalid(
            f"{module}: {wanted[0].value} has rank {a.shape[0]}, {wanted[1].value} rank {b.shape[1]}"
        )
    path = key.trained_path
    alpha, scaling = _alpha_and_scaling(path, a.shape[0], adapter_config)
    magnitude = parts[Part.MAGNITUDE][1] if Part.MAGNITUDE in parts else None
    if transposed:
        # PEFT adds (lora_embedding_B @ lora_embedding_A).T to an embedding, so that its B is our A transposed.
        return LoraWeights(module, b, a, alpha, scaling, magnitude, transposed=True, trained_path=path)
    weights = LoraWeights(module, a, b, alpha, scaling, magnitude, trained_path=path)
    is_torchtune = any(key.is_torchtune for key, _ in parts.values())
    return _with_head_dim(weights, base_config) if is_torchtune else weights


def _alpha_and_scaling(module: str, stored_rank: int, adapter_config: Mapping[str, Any]) -> tuple[float, float]:
    """lora_alpha of a module and the factor of its B·A. Raises LoraWeightsInvalid."""
    try:
        rank_pattern, alpha_pattern = (valid_patterns(name, adapter_config) for name in patterns.OF_VALUES)
    except PatternInvalid as invalid:
        raise LoraWeightsInvalid(f"{module}: {invalid}") from None
    rank = by_pattern(rank_pattern, module, adapter_config.get("r"))
    alpha = by_pattern(alpha_pattern, module, adapter_config.get("lora_alpha"))
    if rank != stored_rank:
        raise LoraWeightsInvalid(
            f"{module}: {ADAPTER_CONFIG} says rank {shown(rank)}, the weights have {stored_rank}, so the scale is "
            f"unknown: put the {ADAPTER_CONFIG} of this training run beside them"
        )
    # A comparison, since no float has the value of a very large integer.
    if type(alpha) not in (int, float) or not -_MAX_ALPHA < alpha < _MAX_ALPHA:
        raise LoraWeightsInvalid(
            f"{module}: lora_alpha is {shown(alpha)}, not a number: write the one of the training run"
        )
    return alpha, lora.scaling(alpha, stored_rank, rslora=bool(adapter_config.get("use_rslora")))


def _with_head_dim(weights: LoraWeights, base_config: Mapping[str, Any]) -> LoraWeights:
    """The weights with `head_dim` set, where torchtune orders the rows of q and k differently within each head.

    See `lora.unpermute_rotary`.
    """
    place = name_in_layer(weights.module)
    if place is None or place[1] not in ROTATED:
        return weights
    if not base_config:
        raise LoraWeightsInvalid(
            f"{weights.module}: torchtune's own names need config.json of the base model, which says how its rows are "
            "ordered: copy it beside the adapter"
        )
    family = FAMILIES.get(str(base_config.get("model_type")))
    if family is None or place[1] not in family.rotated:
        return weights
    size = model_config.head_dim(base_config)
    if size is None or size % 2 or weights.out_features % size:
        raise LoraWeightsInvalid(
            f"{weights.module}: {weights.out_features} rows are no whole number of heads of {size!r} (config.json)"
        )
    return replace(weights, head_dim=size)
