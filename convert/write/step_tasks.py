"""The task that computes each step of a plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from convert.inputs.adapter_checkpoint import Checkpoint, LoraWeights
from convert.inputs.base_model import BaseModel
from convert.plan.conversion_plan import CastStep, CopyStep, LinearStep, ModelPlan, Step, UpdateStep
from convert.plan.weight_updates import updated_weight
from convert.quantization.nf4 import Nf4
from convert.safetensors_io.tensors import DTYPES
from convert.write.row_sources import FloatRows, Nf4Rows, RowSource
from convert.write.tasks import CopyTask, Delta, MergeTask, TensorTask, WholeWeightTask, require_finite

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class StepTasks:
    """The tasks of a plan, for the base and the checkpoint that it was made for."""

    plan: ModelPlan
    base: BaseModel
    checkpoint: Checkpoint

    def task(self, step: Step) -> TensorTask:
        match step:
            case CopyStep(spec):
                return CopyTask(spec)
            case CastStep(spec):
                return MergeTask(FloatRows(self.base.tensors.specs[spec.name]), spec, None)
            case LinearStep():
                source = self._row_source(step)
                if source is None:
                    return WholeWeightTask(lambda: self._linear_tensors(step))
                return MergeTask(source, step.outputs[0], self._read_delta(step.update.lora_weights))
            case UpdateStep():
                return WholeWeightTask(lambda: self._updated_tensors(step))

    def _row_source(self, step: LinearStep) -> RowSource | None:
        """The layer's weight as the adapter was trained on it, by rows; None where only the whole can be computed.

        The whole weight is needed to quantize it, to dequantize it from another format than NF4, and for updates other
        than a delta.
        """
        linear, output_format = step.linear, self.plan.output_format
        if step.quantization_format or not step.update.is_by_row:
            return None
        if isinstance(linear.quantization_format, Nf4):
            return Nf4Rows(self.base, linear, linear.quantization_format)
        is_quantized_first = (
            output_format.merged_onto
            and output_format.quantizer
            and not (self.base.quantization_format or linear.is_head)
        )
        if linear.quantization_format or is_quantized_first:
            return None
        return FloatRows(self.base.tensors.specs[linear.weight])

    def _read_delta(self, lora_weights: LoraWeights | None) -> Callable[[], Delta] | None:
        return (lambda: (*self.checkpoint.read(lora_weights), lora_weights.scaling)) if lora_weights else None

    def _linear_tensors(self, step: LinearStep) -> Iterator[tuple[str, torch.Tensor]]:
        linear, output_format = step.linear, self.plan.output_format
        if output_format.merged_onto is None:
            weight = self.base.read_for_quantizing(linear)
        else:
            weight = self.base.read_as_trained(linear, output_format.quantizer)
        if not step.update.is_empty:
            weight = updated_weight(weight.float(), step.update, self.checkpoint)
        if step.quantization_format:
            require_finite(linear.module, weight)
            yield from step.quantization_format.quantize(linear.module, weight).items()
        else:
            dtype = _torch_dtype(step.outputs[0].dtype)
            require_finite(linear.module, weight, dtype)
            yield linear.weight, weight.to(dtype)

    def _updated_tensors(self, step: UpdateStep) -> Iterator[tuple[str, torch.Tensor]]:
        weight = self.base.tensors.read(step.source.name).float()
        weight, dtype = updated_weight(weight, step.update, self.checkpoint), _torch_dtype(step.spec.dtype)
        require_finite(step.spec.name, weight, dtype)
        yield step.spec.name, weight.to(dtype)


def _torch_dtype(dtype: str) -> torch.dtype:
    import torch

    torch_dtype: torch.dtype = getattr(torch, DTYPES[dtype][1])
    return torch_dtype
