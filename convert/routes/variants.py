"""Every way a checkpoint can be treated, with what it costs. One table, for the choice, refusals, `inspect`, `plan`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from convert.artifact import RouteName
from convert.detect import Training
from convert.plan import MergedOnto

RouteOption = Literal["auto", "adapter", "merge", "rebase", "recover"]
Storage = Literal["none", "nf4", "w8a8-int8", "fp8-dynamic", "w4a16"]
"""As the command line calls it; `nf4` is with double quantization."""
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
class Way:
    """One combination of training, route and storage. `onto`: of a merge, which weights the delta is added to."""

    training: Training
    route: RouteName
    storage: Storage
    onto: MergedOnto | None = None

    @property
    def is_exact(self) -> bool:
        """The same function as trained, by construction."""
        trained_on: Storage = "nf4" if self.training is Training.QLORA else "none"
        return self.route == "adapter" and self.storage == trained_on

    @property
    def is_same_grid(self) -> bool:
        """The sum goes back onto the 4-bit grid that the adapter was trained against."""
        return self.onto == "dequantized" and self.storage == "nf4"

    @property
    def is_offered(self) -> bool:
        """Whether refusals and `inspect` name it; the others are there for comparison, or on insistence."""
        return self in OFFERED

    @property
    def stored(self) -> str:
        return _NAMES[self.storage]

    @property
    def flags(self) -> str:
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
    def why(self) -> str:
        """Why one would go it, as the beginning of a sentence."""
        match self.route:
            case "adapter":
                return _ADAPTER_WHY[self.training, self.storage == "none"]
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
                return f"the delta is added to {self._weights}, in float32, and the sum is {_QUANTIZED[self.storage]}"

    @property
    def _weights(self) -> str:
        if self.onto == "dequantized":
            return "the dequantized 4-bit weights it was trained against"
        if self.training is Training.QLORA:
            return "the original weights, which it was not trained against"
        return "the full-precision weights it was trained on"

    @property
    def loss(self) -> str:
        """What it costs, before anything is measured."""
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
            causes.append("rounding to 16 bits" if self.storage == "none" else f"quantization to {self.stored}")
        return f"{', '.join(causes)}; measured"

    @property
    def serving(self) -> str:
        if self.route == "adapter" and self.storage == "none":
            return "hot-swappable; many adapters share one base of full size"
        if self.route == "adapter":
            return "hot-swappable; many adapters share one small base; the adapter costs some speed"
        if self.route == "rebase":
            return "hot-swappable; shares a base with adapters trained on it; a larger rank"
        if self.storage == "none":
            return "one plain 16-bit model: fastest kernels, most memory, no swapping"
        return "one small model; no swapping"


_ADAPTER_WHY: Mapping[tuple[Training, bool], str] = {
    (Training.QLORA, False): "the adapter was trained against the 4-bit weights, and on them it stays what it was",
    (Training.LORA, False): "the adapter stays separate, on a 4-bit base it was not trained on",
    (Training.LORA, True): "the adapter stays separate, on the full-precision base it was trained on",
}

_Q, _L = Training.QLORA, Training.LORA
OFFERED: tuple[Way, ...] = (
    Way(_Q, "adapter", "nf4"),
    Way(_Q, "merge", "none", "dequantized"),
    Way(_Q, "merge", "w8a8-int8", "dequantized"),
    Way(_Q, "merge", "fp8-dynamic", "dequantized"),
    Way(_Q, "merge", "w4a16", "dequantized"),
    Way(_Q, "merge", "nf4", "original"),
    Way(_Q, "rebase", "none"),
    Way(_Q, "recover", "none"),
    Way(_L, "merge", "none", "original"),
    Way(_L, "merge", "w8a8-int8", "original"),
    Way(_L, "merge", "fp8-dynamic", "original"),
    Way(_L, "merge", "w4a16", "original"),
    Way(_L, "merge", "nf4", "original"),
    Way(_L, "adapter", "none"),
    Way(_L, "adapter", "nf4"),
    Way(_L, "rebase", "nf4"),
)
_ON_REQUEST: tuple[Way, ...] = (
    Way(_Q, "merge", "none", "original"),
    Way(_Q, "merge", "w8a8-int8", "original"),
    Way(_Q, "merge", "fp8-dynamic", "original"),
    Way(_Q, "merge", "w4a16", "original"),
    Way(_Q, "merge", "nf4", "dequantized"),
    Way(_Q, "recover", "nf4"),
    Way(_Q, "recover", "w8a8-int8"),
    Way(_Q, "recover", "fp8-dynamic"),
    Way(_Q, "recover", "w4a16"),
)
WAYS = OFFERED + _ON_REQUEST


def ways_for(training: Training) -> tuple[Way, ...]:
    """Those that are offered. Of unknown training: of both kinds."""
    return tuple(way for way in OFFERED if training in (way.training, Training.UNKNOWN))


def find(training: Training, route: RouteName, storage: Storage, onto: OntoOption = "auto") -> Way | None:
    """The way with these properties; `auto` is what the adapter was trained against, where that makes sense."""
    found = [way for way in WAYS if (way.training, way.route, way.storage) == (training, route, storage)]
    if onto != "auto":
        return next((way for way in found if way.onto == onto), None)
    trained_on: MergedOnto = "dequantized" if training is Training.QLORA else "original"
    return next((way for way in found if way.onto in (None, trained_on)), None)
