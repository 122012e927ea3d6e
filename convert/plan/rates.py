"""Measures how fast this machine does the kinds of work of a conversion, on a sample of each: a second or two."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from convert.inputs import lora
from convert.inputs.adapter_checkpoint import Checkpoint
from convert.inputs.base_model import BaseModel
from convert.plan.conversion_plan import LinearStep, ModelPlan
from convert.plan.phases import Rates
from convert.quantization.format import QuantizationFormat
from convert.safetensors_io.tensors import DTYPES

# The speed that is assumed for writing to the disk: measuring it would write.
_WRITTEN_BYTES_PER_S = 400e6
_COPIED_BYTES_PER_S = 2e9
_SAMPLE_TOKENS = 128
_SAMPLE_POSITIONS = 16
_SAMPLE_BYTES = 64 << 20


def measure_rates(
    plan: ModelPlan | None, base: BaseModel, checkpoint: Checkpoint, quantizer: QuantizationFormat | None
) -> Rates:
    """`quantizer`: of the base in training, None for LoRA. Reads some weights of base and checkpoint."""
    import torch

    read_bytes = _read_s_per_byte(base)
    largest = max(base.linears.values(), key=lambda linear: math.prod(linear.shape))
    in_layer = max(base.layer_linears, key=lambda linear: math.prod(linear.shape), default=largest)
    count = math.prod(in_layer.shape)
    weight, states = torch.ones(in_layer.shape), torch.ones(_SAMPLE_TOKENS, in_layer.in_features)
    return Rates(
        converted=_convert_s_per_weight(plan, base, checkpoint),
        read_as_trained=_seconds(lambda: base.read_as_trained(in_layer, quantizer)) / count,
        read_stored=_seconds(lambda: base.read(in_layer).float()) / count,
        products=_seconds(lambda: states @ weight.T) / count / _SAMPLE_TOKENS,
        compared=_seconds(lambda: _compare(base.vocabulary)) / _SAMPLE_POSITIONS,
        read_bytes=read_bytes,
        written_bytes=1 / _WRITTEN_BYTES_PER_S,
    )


def _read_s_per_byte(base: BaseModel) -> float:
    """Of the file as it is found, in the page cache or not: the sample is read once."""
    path = max(base.tensors.files, key=lambda file: file.stat().st_size)
    began = time.perf_counter()
    with path.open("rb") as stream:
        count = len(stream.read(_SAMPLE_BYTES))
    return (time.perf_counter() - began) / max(count, 1)


def _convert_s_per_weight(plan: ModelPlan | None, base: BaseModel, checkpoint: Checkpoint) -> float:
    """Seconds for each weight of a linear layer, from reading it to the stored tensors."""
    steps = [step for step in plan.steps if isinstance(step, LinearStep)] if plan else []
    if plan is None or not steps:
        return DTYPES[base.dtype][0] / _COPIED_BYTES_PER_S
    sample = max(steps, key=lambda step: math.prod(step.linear.shape))
    lora_weights, quantizer = sample.update.lora_weights, plan.output_format.quantizer

    def convert_sample() -> None:
        weight = base.read_as_trained(sample.linear, quantizer)
        if lora_weights:
            a, b = checkpoint.read(lora_weights)
            lora.add_delta(weight, a, b, lora_weights.scaling)
        if sample.quantization_format:
            sample.quantization_format.quantize(sample.linear.module, weight)

    return _seconds(convert_sample) / math.prod(sample.linear.shape)


def _compare(vocabulary: int) -> float:
    """The work on two distributions at `_SAMPLE_POSITIONS` positions: both are normalized, and their KL is taken."""
    import torch

    logits = torch.zeros(_SAMPLE_POSITIONS, vocabulary)
    p, q = (logits.log_softmax(-1) for _ in range(2))
    log_p = p.double()
    divergence = (log_p.exp() * (log_p - q.double())).sum()
    return float(divergence + (p.argmax(-1) == q.argmax(-1)).sum())


def _seconds(work: Callable[[], object]) -> float:
    """Seconds of the second run, since the first one also loads libraries."""
    work()
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
