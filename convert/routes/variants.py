"""The route variants: one table of every combination of training, route and storage, with the loss of each one.

The choice of a route, the refusals and the commands `inspect`, `plan` and `compare` all read this table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from convert.artifact import RouteName
from convert.detection.training import Training
from convert.plan.conversion_plan import MergedOnto

RouteOption = Literal["auto", "adapter", "merge", "rebase", "recover"]
Storage = Literal["none", "nf4", "w8a8-int8", "fp8-dynamic", "w4a16"]
"""How linear layers are stored, as the command line names it; `nf4` means NF4 with double quantization."""
QuantizeOption = Literal["auto", "none", "nf4", "w8a8-int8", "fp8-dynamic", "w4a16"]
OntoOption = Literal["auto", "original", "dequantized"]
DtypeOption = Literal["auto", "bfloat16", "float16"]

_NAMES: Mapping[Storage, str] = {
    "none": "16-bit",
    "nf4": "NF4",
    "w8a8-int8": "W8A8 int8",
    "fp8-dynamic": "FP8",
    "w4a16": "W4A16",
}
_QUANTIZED: Mapping[Storage, str] = {
    "none": "rounded once to 16 bits",
    "nf4": "quantized to NF4",
    "w8a8-int8": "quantized to 8-bit integers, one scale per output channel",
    "fp8-dynamic": "quantized to 8-bit floats, one scale per output channel",
    "w4a16": "quantized to 4-bit integers, one scale per group of weights",
}


@dataclass(frozen=True)
class RouteVariant:
    """One combination of training, route and storage.

    `onto`: the weights that a merge adds the delta to; None for the other routes.
    """

    training: Training
    route: RouteName
    storage: Storage
    onto: MergedOnto | None = None

    @property
    def is_exact(self) -> bool:
        """Whether the result computes the same function as in training, by construction."""
        trained_on: Storage = "nf4" if self.training is Training.QLORA else "none"
        return self.route == "adapter" and self.storage == trained_on

    @property
    def is_same_grid(self) -> bool:
        """Whether the sum goes back onto the 4-bit grid that the adapter was trained against."""
        return self.onto == "dequantized" and self.storage == "nf4"

    @property
    def is_offered(self) -> bool:
        """Whether refusals and `inspect` name this variant. The others run only where the options ask for them."""
        return self in OFFERED

    @property
    def storage_name(self) -> str:
        """The storage as prose names it: `W8A8 int8`."""
        return _NAMES[self.storage]

    @property
    def flags(self) -> str:
        """The options of `run` that ask for this variant."""
        words = [f"--route {self.route}"]
        if (self.training, self.route, self.storage) != (Training.QLORA, "adapter", "nf4"):
            words.append(f"--quantize {self.storage}")
        if self.onto == "original" and self.training is Training.QLORA:
            words.append("--merge-onto original")
        if self.is_same_grid:
            words.append("--merge-onto dequantized --force")
        if self.route == "recover":
            words.append("--calibration FILE")
        return " ".join(words)

    @property
    def reason(self) -> str:
        """The reason to take this variant, as the beginning of a sentence."""
        match self.route:
            case "adapter":
                return _ADAPTER_REASONS[self.training, self.storage == "none"]
            case "rebase":
                return (
                    "the adapter moves to a base it was not trained on, with a low-rank correction of the difference "
                    "between the two bases"
                )
            case "recover":
                return (
                    "the adapter is brought back to the full-precision weights: a low-rank fit of the quantization "
                    f"error, then distillation from the function as trained; merged in float32 and "
                    f"{_QUANTIZED[self.storage]}"
                )
            case "merge":
                quantized = _QUANTIZED[self.storage]
                return f"the delta is added to {self._merged_weights}, in float32, and the sum is {quantized}"

    @property
    def _merged_weights(self) -> str:
        if self.onto == "dequantized":
            return "the dequantized 4-bit weights it was trained against"
        if self.training is Training.QLORA:
            return "the original weights, which it was not trained against"
        return "the full-precision weights it was trained on"

    @property
    def loss(self) -> str:
        """What this variant loses, as far as it is known before a measurement."""
        if self.is_exact:
            return "none: the same function as trained"
        if self.is_same_grid:
            return "nearly all of what was learnt"
        causes = []
        if self.route == "adapter":
            causes.append("quantization of the base to 4 bits")
        if self.route == "rebase":
            causes.append("what the correction leaves of the difference between the bases")
        if self.route == "recover":
            causes.append("what distillation leaves")
        if self.onto == "original" and self.training is Training.QLORA:
            causes.append("another base than in training")
        if self.route in ("merge", "recover"):
            causes.append("rounding to 16 bits" if self.storage == "none" else f"quantization to {self.storage_name}")
        return f"{', '.join(causes)}; measured"

    @property
    def serving(self) -> str:
        """What the result means for the server: swapping, sharing of a base, speed."""
        if self.route == "adapter" and self.storage == "none":
            return "hot-swappable; many adapters share one base of full size"
        if self.route == "adapter":
            return "hot-swappable; many adapters share one small base; the adapter costs some speed"
        if self.route == "rebase":
            return "hot-swappable; shares a base with adapters trained on it; a larger rank"
        if self.storage == "none":
            return "one plain 16-bit model: fastest kernels, most memory, no swapping"
        return "one small model; no swapping"


_ADAPTER_REASONS: Mapping[tuple[Training, bool], str] = {
    (Training.QLORA, False): "the adapter was trained against the 4-bit weights, and on them it stays what it was",
    (Training.LORA, False): "the adapter stays separate, on a 4-bit base it was not trained on",
    (Training.LORA, True): "the adapter stays separate, on the full-precision base it was trained on",
}

OFFERED: tuple[RouteVariant, ...] = (
    RouteVariant(Training.QLORA, "adapter", "nf4"),
    RouteVariant(Training.QLORA, "merge", "none", "dequantized"),
    RouteVariant(Training.QLORA, "merge", "w8a8-int8", "dequantized"),
    RouteVariant(Training.QLORA, "merge", "fp8-dynamic", "dequantized"),
    RouteVariant(Training.QLORA, "merge", "w4a16", "dequantized"),
    RouteVariant(Training.QLORA, "merge", "nf4", "original"),
    RouteVariant(Training.QLORA, "rebase", "none"),
    RouteVariant(Training.QLORA, "recover", "none"),
    RouteVariant(Training.LORA, "merge", "none", "original"),
    RouteVariant(Training.LORA, "merge", "w8a8-int8", "original"),
    RouteVariant(Training.LORA, "merge", "fp8-dynamic", "original"),
    RouteVariant(Training.LORA, "merge", "w4a16", "original"),
    RouteVariant(Training.LORA, "merge", "nf4", "original"),
    RouteVariant(Training.LORA, "adapter", "none"),
    RouteVariant(Training.LORA, "adapter", "nf4"),
    RouteVariant(Training.LORA, "rebase", "nf4"),
)
_ON_REQUEST: tuple[RouteVariant, ...] = (
    RouteVariant(Training.QLORA, "merge", "none", "original"),
    RouteVariant(Training.QLORA, "merge", "w8a8-int8", "original"),
    RouteVariant(Training.QLORA, "merge", "fp8-dynamic", "original"),
    RouteVariant(Training.QLORA, "merge", "w4a16", "original"),
    RouteVariant(Training.QLORA, "merge", "nf4", "dequantized"),
    RouteVariant(Training.QLORA, "recover", "nf4"),
    RouteVariant(Training.QLORA, "recover", "w8a8-int8"),
    RouteVariant(Training.QLORA, "recover", "fp8-dynamic"),
    RouteVariant(Training.QLORA, "recover", "w4a16"),
)
VARIANTS = OFFERED + _ON_REQUEST


def offered_variants(training: Training) -> tuple[RouteVariant, ...]:
    """The variants that are offered for a training; those of both trainings where it is unknown."""
    return tuple(variant for variant in OFFERED if training in (variant.training, Training.UNKNOWN))


def find_variant(
    training: Training, route: RouteName, storage: Storage, onto: OntoOption = "auto"
) -> RouteVariant | None:
    """The variant with these properties, None where there is none.

    `onto` = "auto" stands for the weights that the adapter was trained against.
    """
    wanted = (training, route, storage)
    candidates = [variant for variant in VARIANTS if (variant.training, variant.route, variant.storage) == wanted]
    if onto != "auto":
        return next((variant for variant in candidates if variant.onto == onto), None)
    trained_on: MergedOnto = "dequantized" if training is Training.QLORA else "original"
    return next((variant for variant in candidates if variant.onto in (None, trained_on)), None)
