"""Estimates what writing a model takes. Sizes come from the plan and are exact; memory is that of what is alive."""

from __future__ import annotations

import math
import os
from dataclasses import replace

from convert.inputs.adapter_checkpoint import Checkpoint
from convert.inputs.base_model import BaseModel
from convert.plan.conversion_plan import LinearStep, ModelPlan, UpdateStep
from convert.plan.phases import ALLOCATOR_BYTES, LIBRARY_BYTES, Phase, Work
from convert.quantization.nf4 import Nf4
from convert.safetensors_io.tensors import DTYPES

# The blocks of a stream: 8 that are written, and those that are read or computed, each with its float32 form.
_BLOCK_BYTES = 4 << 20
_WRITTEN_BLOCKS = 8
_BLOCKS_OF_THREAD = 3
_READ_BLOCKS = 5
# Bytes for each weight of the largest one, where it is computed as a whole. Merged: as stored in 16 bits, and in
# float32. bitsandbytes quantizes it piece by piece; compressed-tensors holds it in float32 four times.
_SEPARATE_NF4 = 3
_KEPT_BY_ALLOCATOR = 8
_MERGED = 6.5
_COMPRESSED = 16
_UPDATED = 10


def writing_phase(plan: ModelPlan, base: BaseModel) -> Phase:
    """Reading the base and writing the model of a plan. No adapter is written."""
    steps = [step for step in plan.steps if isinstance(step, LinearStep)]
    converted = sum(math.prod(step.linear.shape) for step in steps)
    output = plan.weight_bytes
    return Phase(
        "Writing the model",
        LIBRARY_BYTES + max(_streaming_bytes(), _largest_delta(plan)) + _whole_weight_bytes(plan, base),
        Work(
            converted=converted,
            read_bytes=sum(spec.nbytes for spec in base.tensors.specs.values()),
            written_bytes=output,
        ),
        disk_bytes=output,
        remedy="Free some, or raise the limit.",
    )


def adapter_phase(checkpoint: Checkpoint, model_bytes: int) -> Phase:
    """Writing the adapter of the checkpoint beside a model of so many bytes."""
    largest = max((spec.nbytes for spec in checkpoint.adapter_state.specs), default=0)
    nbytes = checkpoint.weight_bytes
    work = Work(read_bytes=nbytes, written_bytes=nbytes)
    return Phase("Writing the adapter", LIBRARY_BYTES + 4 * largest, work, model_bytes + nbytes)


def beside(phase: Phase, disk_bytes: int) -> Phase:
    """The phase while other files of so many bytes are at the destination."""
    return replace(phase, disk_bytes=phase.disk_bytes + disk_bytes)


def _streaming_bytes() -> int:
    threads = min(4, os.cpu_count() or 1)
    return _BLOCK_BYTES * (_WRITTEN_BLOCKS + _READ_BLOCKS + _BLOCKS_OF_THREAD * threads)


def _largest_delta(plan: ModelPlan) -> int:
    """A and B of the largest delta, as stored and in float32."""
    deltas = (step.update.lora_weights for step in plan.steps if isinstance(step, LinearStep))
    return max((2 * 4 * math.prod(spec.shape) for delta in deltas if delta for spec in (delta.a, delta.b)), default=0)


def _whole_weight_bytes(plan: ModelPlan, base: BaseModel) -> int:
    """The largest weight that is computed as a whole, with everything that is computed from it meanwhile."""
    sizes = [_whole_bytes(step, plan, base) for step in plan.steps if isinstance(step, LinearStep)]
    sizes += [_UPDATED * math.prod(step.spec.shape) for step in plan.steps if isinstance(step, UpdateStep)]
    return math.ceil(max(sizes, default=0) + min(ALLOCATOR_BYTES, _KEPT_BY_ALLOCATOR * _largest_whole(plan, base)))


def _largest_whole(plan: ModelPlan, base: BaseModel) -> int:
    """The number of weights in the largest linear layer that is computed as a whole."""
    steps = [step for step in plan.steps if isinstance(step, LinearStep) and _whole_bytes(step, plan, base)]
    return max((math.prod(step.linear.shape) for step in steps), default=0)


def _whole_bytes(step: LinearStep, plan: ModelPlan, base: BaseModel) -> float:
    weights, output_format = math.prod(step.linear.shape), plan.output_format
    if isinstance(step.quantization_format, Nf4):
        return weights * (_SEPARATE_NF4 if output_format.merged_onto is None else _MERGED)
    if step.quantization_format:
        return weights * _COMPRESSED
    is_stored_by_row = base.quantization_format is None or isinstance(base.quantization_format, Nf4)
    is_quantized_first = output_format.quantizer is not None and base.quantization_format is None
    if step.update.is_by_row and is_stored_by_row and not (is_quantized_first and output_format.merged_onto):
        return 0.0
    return weights * (_MERGED if step.update.is_by_row else _UPDATED + DTYPES[base.dtype][0])
