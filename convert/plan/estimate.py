"""Estimates the memory, disk space and time of a conversion.

Sizes come from the plan and are exact. For times, the conversion of the largest linear layer and a multiplication with
it are measured; all other weights are assumed to take the same time for each element.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from convert.inputs import lora
from convert.inputs.adapter_checkpoint import Checkpoint
from convert.inputs.base_model import BaseModel
from convert.plan.conversion_plan import LinearStep, ModelPlan
from convert.safetensors_io.tensors import DTYPES

# Python with torch and the libraries around it, before the first tensor.
_LIBRARY_BYTES = 400 << 20
# The speed that is assumed for the disk.
_DISK_BYTES_PER_S = 400e6
_COPIED_BYTES_PER_S = 2e9
_PIECE_BYTES = 8 << 20
_SAMPLE_TOKENS = 128


@dataclass(frozen=True)
class Estimate:
    """The needs of a conversion. `measuring_*`: where the result is measured; its memory is needed after writing."""

    output_bytes: int
    writing_memory_bytes: int
    writing_s: float
    measuring_memory_bytes: int
    measuring_s: float


def estimate(
    plan: ModelPlan | None,
    base: BaseModel,
    checkpoint: Checkpoint,
    measuring_memory_bytes: int,
    tokens: int,
    passes: int,
    readings: int,
) -> Estimate:
    """`tokens`: of the held-out text; `passes`: the models that are run over it; `readings`: of all weights for that.

    `measuring_memory_bytes`: known to the package that measures.
    """
    adapter = checkpoint.weight_bytes
    if plan is None:
        return Estimate(adapter, _LIBRARY_BYTES + adapter, adapter / _DISK_BYTES_PER_S, 0, 0.0)
    output = plan.weight_bytes + (adapter if plan.output_format.merged_onto is None else 0)
    elements = sum(math.prod(linear.shape) for linear in base.linears.values())
    convert_s = _convert_s_per_element(plan, base, checkpoint)
    return Estimate(
        output_bytes=output,
        writing_memory_bytes=_LIBRARY_BYTES + adapter + 2 * _largest_bytes(plan),
        writing_s=convert_s * elements + output / _DISK_BYTES_PER_S,
        measuring_memory_bytes=measuring_memory_bytes,
        measuring_s=(passes * tokens * _multiply_s_per_element(base) + readings * convert_s) * elements,
    )


def _largest_bytes(plan: ModelPlan) -> int:
    """The memory of the largest tensor: a linear layer in float32, or a piece of a tensor that is copied."""
    copied = max((spec.nbytes for step in plan.steps for spec in step.outputs), default=0)
    linear = max((4 * math.prod(step.linear.shape) for step in _linear_steps(plan)), default=0)
    return max(min(copied, _PIECE_BYTES), linear)


def _linear_steps(plan: ModelPlan) -> list[LinearStep]:
    return [step for step in plan.steps if isinstance(step, LinearStep)]


def _convert_s_per_element(plan: ModelPlan, base: BaseModel, checkpoint: Checkpoint) -> float:
    """Seconds for each element of a linear layer, from reading it to the stored tensors."""
    steps = _linear_steps(plan)
    if not steps:
        return DTYPES[base.dtype][0] / _COPIED_BYTES_PER_S
    sample = max(steps, key=lambda step: math.prod(step.linear.shape))
    lora_weights = sample.update.lora_weights

    def convert_sample() -> None:
        weight = base.read_as_trained(sample.linear, plan.output_format.quantizer)
        if lora_weights:
            a, b = checkpoint.read(lora_weights)
            lora.add_delta(weight, a, b, lora_weights.scaling)
        if sample.quantization_format:
            sample.quantization_format.quantize(sample.linear.module, weight)

    return _seconds(convert_sample) / math.prod(sample.linear.shape)


def _multiply_s_per_element(base: BaseModel) -> float:
    """Seconds for each element of a linear layer and each token, in float32."""
    import torch

    largest = max(base.linears.values(), key=lambda linear: math.prod(linear.shape))
    weight, tokens = torch.ones(largest.shape), torch.ones(_SAMPLE_TOKENS, largest.in_features)
    return _seconds(lambda: tokens @ weight.T) / math.prod(largest.shape) / _SAMPLE_TOKENS


def _seconds(work: Callable[[], object]) -> float:
    """Seconds of the second run, since the first one also loads libraries."""
    work()
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
