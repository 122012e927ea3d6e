"""What a conversion will need: memory, disk and time, from the plan and from one weight that is really treated.

Sizes are exact, they are planned. Time is extrapolated: the largest linear layer is read, made and multiplied with
once, and everything else is taken to cost as much for each of its elements.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from convert import lora
from convert.base_model import BaseModel
from convert.checkpoint import Checkpoint
from convert.plan import Made, ModelPlan
from convert.tensors import DTYPES

# Python with torch and the libraries around it, before the first tensor.
_LIBRARY_BYTES = 400 << 20
# A disk that is not slow: what the last bytes wait for.
_DISK_BYTES_PER_S = 400e6
_COPIED_BYTES_PER_S = 2e9
_SAMPLE_TOKENS = 128


@dataclass(frozen=True)
class Estimate:
    """`measuring_*` is on top, and only where the result is measured."""

    output_bytes: int
    writing_memory_bytes: int
    writing_s: float
    measuring_memory_bytes: int
    measuring_s: float


def estimate(plan: ModelPlan | None, base: BaseModel, checkpoint: Checkpoint, tokens: int, passes: int) -> Estimate:
    """`tokens`: of the held-out text; `passes`: models that are run over it, one after the other."""
    adapter = checkpoint.weight_bytes
    if plan is None:
        return Estimate(adapter, _LIBRARY_BYTES + adapter, adapter / _DISK_BYTES_PER_S, 0, 0.0)
    output = plan.weight_bytes + (adapter if plan.form.merged_onto is None else 0)
    elements = sum(math.prod(linear.shape) for linear in base.linears.values())
    parameters = elements + sum(math.prod(spec.shape) for spec in base.others)
    making_s = _making_s(plan, base, checkpoint)
    return Estimate(
        output_bytes=output,
        writing_memory_bytes=_LIBRARY_BYTES + adapter + 2 * largest_bytes(plan, base),
        writing_s=making_s * elements + output / _DISK_BYTES_PER_S,
        measuring_memory_bytes=_LIBRARY_BYTES + 4 * parameters,
        measuring_s=passes * (tokens * _multiplying_s(base) + making_s) * elements,
    )


def largest_bytes(plan: ModelPlan, base: BaseModel) -> int:
    """The largest tensor that is in memory at once, in float32 where it is computed with."""
    copied = max((spec.nbytes for step in plan.steps for spec in step.outputs), default=0)
    made = max((4 * math.prod(step.linear.shape) for step in plan.steps if isinstance(step, Made)), default=0)
    return max(min(copied, 8 << 20), made) if made else min(copied, 8 << 20)


def _making_s(plan: ModelPlan, base: BaseModel, checkpoint: Checkpoint) -> float:
    """Seconds for each element of a linear layer, from reading to the stored form."""
    made = [step for step in plan.steps if isinstance(step, Made)]
    if not made:
        return DTYPES[base.dtype][0] / _COPIED_BYTES_PER_S
    sample = max(made, key=lambda step: math.prod(step.linear.shape))
    pair = sample.edit.pair

    def work() -> None:
        weight = base.read_as_trained(sample.linear, plan.form.quantizer)
        if pair:
            a, b = checkpoint.read(pair)
            lora.add_delta(weight, a, b, pair.scaling)
        if sample.stored:
            sample.stored.quantize(sample.linear.module, weight)

    return _seconds(work) / math.prod(sample.linear.shape)


def _multiplying_s(base: BaseModel) -> float:
    """Seconds for each element of a linear layer and each token of a row, in float32."""
    import torch

    largest = max(base.linears.values(), key=lambda linear: math.prod(linear.shape))
    weight, tokens = torch.ones(largest.shape), torch.ones(_SAMPLE_TOKENS, largest.in_features)
    return _seconds(lambda: tokens @ weight.T) / math.prod(largest.shape) / _SAMPLE_TOKENS


def _seconds(work: Callable[[], object]) -> float:
    """The second run: the first one also loads libraries."""
    work()
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
