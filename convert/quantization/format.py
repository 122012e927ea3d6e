"""The interface of a quantization format: into which tensors it turns a linear layer's weight, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from convert.artifact import QuantizationName
from convert.safetensors_io.tensors import TensorSpec

if TYPE_CHECKING:
    import torch


class QuantizationFormat(Protocol):
    """One way to store the weights of linear layers in 4 or 8 bits. Formats with the same settings are equal."""

    @property
    def name(self) -> QuantizationName:
        """The name in manifests and on the command line."""
        ...

    def specs(self, module: str, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        """Names, types and shapes of what `quantize` returns for the module's weight (out, in)."""
        ...

    def quantize(self, module: str, weight: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """The stored tensors of a float weight (out, in), by full name."""
        ...

    def dequantize(self, module: str, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The weight (out, in) in float32, from its stored tensors by full name."""
        ...

    def config(self, float_parts: Sequence[str] = ()) -> dict[str, Any]:
        """The `quantization_config` of config.json. `float_parts`: modules in which nothing is quantized."""
        ...
