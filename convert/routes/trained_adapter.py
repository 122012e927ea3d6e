"""The function as trained: an adapter together with the weights that it was trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from convert.inputs.adapter_checkpoint import Checkpoint
from convert.inputs.base_model import BaseModel, Linear
from convert.quality import load
from convert.quality.models.peft_reference import with_adapter
from convert.quantization.nf4 import Nf4

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TrainedAdapter:
    """An adapter, and the weights T that it was trained on: those of `base`, quantized and dequantized.

    `quantizer` is None for a LoRA: it was trained on the weights of `base` as they are.
    """

    checkpoint: Checkpoint
    base: BaseModel
    quantizer: Nf4 | None

    def load(self) -> Any:
        """The function as trained: a PEFT model in float32, with every weight in memory."""
        return with_adapter(load(self.base, self.quantizer), self.checkpoint)

    def base_weight(self, linear: Linear) -> torch.Tensor:
        """The weight in T of a linear layer of `base`, (out, in) in float32."""
        return self.base.read_as_trained(linear, self.quantizer)


def own_linears(model: BaseModel) -> dict[str, Linear]:
    """The linear layers that have a weight of their own, by module.

    A head that is tied to the embedding has none, even where the file stores it a second time.
    """
    return {module: linear for module, linear in model.linears.items() if not (linear.is_head and model.is_tied)}
