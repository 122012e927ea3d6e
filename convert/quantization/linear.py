"""A linear layer of a model, and how its weight is stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.errors import BaseUnreadable
from convert.quantization import compressed, nf4
from convert.quantization.compressed import Compressed
from convert.quantization.format import QuantizationFormat
from convert.safetensors_io.tensors import FLOATS, Tensors


@dataclass(frozen=True)
class Linear:
    """A linear layer; `is_head`: the output head. `quantization_format`: None where its weight is stored as floats."""

    module: str
    out_features: int
    in_features: int
    quantization_format: QuantizationFormat | None
    is_head: bool = False

    @property
    def weight(self) -> str:
        """The name of its weight."""
        return f"{self.module}.weight"

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @property
    def stored_names(self) -> tuple[str, ...]:
        """The tensors in which its weight is stored: one, or the parts of its quantization format."""
        if self.quantization_format is None:
            return (self.weight,)
        return tuple(spec.name for spec in self.quantization_format.specs(self.module, self.shape))


def stored_linear(root: Path, tensors: Tensors, module: str, compressed_format: Compressed | None) -> Linear:
    """The layer of this name. `compressed_format`: that of the model. Raises BaseUnreadable for other weights."""
    if compressed_format:
        shape = compressed.stored_shape(root, tensors, module, compressed_format)
        return Linear(module, *shape, compressed_format)
    if f"{module}.weight.{nf4.STATE}" in tensors:
        nf4_format, shape = nf4.stored_layer(root, tensors, module)
        return Linear(module, *shape, nf4_format)
    spec = tensors.specs.get(f"{module}.weight")
    if spec is None or spec.dtype not in FLOATS or len(spec.shape) != 2 or 0 in spec.shape:
        stored = f"{spec.dtype} {list(spec.shape)}" if spec else "packed"
        raise BaseUnreadable(
            f"{root}: '{module}.weight' is {stored}; expected a matrix of bfloat16, float16 or float32, or NF4 with "
            "its quant_state. Give the original model, or one stored as NF4."
        )
    return Linear(module, spec.shape[0], spec.shape[1], None)


def compressed_format_of(
    root: Path, config: Mapping[str, Any], tensors: Tensors, float_parts: Sequence[str]
) -> Compressed | None:
    """The format of compressed-tensors that config.json names. Raises BaseUnreadable for another quantization."""
    quantization = config.get("quantization_config")
    if quantization is None:
        return None
    method = quantization.get("quant_method")
    if method == compressed.METHOD:
        return compressed.format_of(root, quantization, tensors, float_parts)
    if method != "bitsandbytes":
        raise BaseUnreadable(
            f"{root} is quantized by {method!r}. Give the original model, or one stored as NF4 or by "
            f"{compressed.METHOD} as {', '.join(compressed.NAMES)}."
        )
    nf4.require_nf4(root, quantization)
    return None
