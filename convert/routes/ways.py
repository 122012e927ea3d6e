"""Every way a checkpoint can be treated, with what it costs. One table, for the choice, refusals and `inspect`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from convert.detect import Training

RouteName = Literal["adapter", "merge"]
RouteOption = Literal["auto", "adapter", "merge"]
QuantizeOption = Literal["auto", "none", "nf4"]
DtypeOption = Literal["auto", "bfloat16", "float16"]


@dataclass(frozen=True)
class Way:
    """One combination of training, route and storage that keeps what was learnt."""

    training: Training
    route: RouteName
    nf4: bool
    flags: str
    why: str
    loss: str
    serving: str

    @property
    def stored(self) -> str:
        return "NF4" if self.nf4 else "16-bit"


QLORA_ADAPTER = Way(
    Training.QLORA,
    "adapter",
    True,
    "--route adapter",
    "the adapter was trained against the 4-bit weights, and on them it stays what it was",
    "none: the same function as trained",
    "hot-swappable; many adapters share one base; the adapter costs some speed",
)
QLORA_MERGE = Way(
    Training.QLORA,
    "merge",
    False,
    "--route merge --quantize none",
    "the delta is added to the dequantized 4-bit weights it was trained against, in float32, rounded once to 16 bits",
    "rounding to 16 bits; measured",
    "one plain 16-bit model: fastest kernels, most memory, no swapping",
)
LORA_MERGE_NF4 = Way(
    Training.LORA,
    "merge",
    True,
    "--route merge --quantize nf4",
    "the delta is added to the full-precision weights it was trained on, and the sum is quantized to NF4",
    "quantization to 4 bits; measured",
    "one small model; no swapping",
)
LORA_MERGE = Way(
    Training.LORA,
    "merge",
    False,
    "--route merge --quantize none",
    "the delta is added to the full-precision weights it was trained on, in float32, rounded once to 16 bits",
    "rounding to 16 bits; measured",
    "one plain 16-bit model: fastest kernels, most memory, no swapping",
)
LORA_ADAPTER_NF4 = Way(
    Training.LORA,
    "adapter",
    True,
    "--route adapter",
    "the adapter stays separate, on a 4-bit base it was not trained on",
    "quantization of the base to 4 bits; measured",
    "hot-swappable; many adapters share one small base; the adapter costs some speed",
)
LORA_ADAPTER = Way(
    Training.LORA,
    "adapter",
    False,
    "--route adapter --quantize none",
    "the adapter stays separate, on the full-precision base it was trained on",
    "none: the same function as trained",
    "hot-swappable; many adapters share one base of full size",
)

WAYS = (QLORA_ADAPTER, QLORA_MERGE, LORA_MERGE_NF4, LORA_MERGE, LORA_ADAPTER_NF4, LORA_ADAPTER)

# What is asked -> the way. What is not here is refused.
CHOICES: Mapping[tuple[Training, RouteOption, QuantizeOption], Way] = {
    (Training.QLORA, "auto", "auto"): QLORA_ADAPTER,
    (Training.QLORA, "auto", "nf4"): QLORA_ADAPTER,
    (Training.QLORA, "auto", "none"): QLORA_MERGE,
    (Training.QLORA, "adapter", "auto"): QLORA_ADAPTER,
    (Training.QLORA, "adapter", "nf4"): QLORA_ADAPTER,
    (Training.QLORA, "merge", "none"): QLORA_MERGE,
    (Training.LORA, "auto", "auto"): LORA_MERGE_NF4,
    (Training.LORA, "auto", "nf4"): LORA_MERGE_NF4,
    (Training.LORA, "auto", "none"): LORA_MERGE,
    (Training.LORA, "merge", "auto"): LORA_MERGE_NF4,
    (Training.LORA, "merge", "nf4"): LORA_MERGE_NF4,
    (Training.LORA, "merge", "none"): LORA_MERGE,
    (Training.LORA, "adapter", "auto"): LORA_ADAPTER_NF4,
    (Training.LORA, "adapter", "nf4"): LORA_ADAPTER_NF4,
    (Training.LORA, "adapter", "none"): LORA_ADAPTER,
}


def ways_for(training: Training) -> tuple[Way, ...]:
    """The default first. Of unknown training: all of them."""
    return tuple(way for way in WAYS if training in (way.training, Training.UNKNOWN))


def default_way(training: Training) -> Way | None:
    """What `--route auto` takes; None while the training is unknown."""
    return CHOICES.get((training, "auto", "auto"))
