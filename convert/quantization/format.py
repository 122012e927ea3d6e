"""What a quantizer is to the rest of this package: which tensors a linear layer becomes, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from convert.artifact import QuantizationName
from convert.tensors import TensorSpec

if TYPE_CHECKING:
    import torch


class Scheme(Protocol):
    """One way to store linear layers in few bits. A frozen value: two of the same settings are equal."""

    @property
    def name(self) -> QuantizationName:
        """As manifests and the command line call it."""
        ...

    def specs(self, module: str, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        """The tensors that `quantize` gives for the module's weight (out, in): exact, before anything is computed."""
        ...

    def quantize(self, module: str, weight: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """The stored tensors of a float weight (out, in), by full name."""
        ...

    def dequantize(self, module: str, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The weight (out, in) that stored tensors stand for, in float32."""
        ...

    def config(self) -> dict[str, Any]:
        """The `quantization_config` of config.json."""
        ...
