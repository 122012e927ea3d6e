"""How an adapter was trained: the answer of the detection, and one source of it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Training(Enum):
    LORA = "lora"
    QLORA = "qlora"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class TrainingQuantizer:
    """How the weights of the base were quantized in training.

    `double`: whether with double quantization, None where no source says it. `partial`: some linear layers stayed in 16
    bits, and only the base itself says which.
    """

    kind: str = "nf4"
    double: bool | None = None
    partial: bool = False


@dataclass(frozen=True)
class TrainingSource:
    """One source's answer, with a sentence that names the file and the setting it comes from."""

    training: Training
    sentence: str
    quantizer: TrainingQuantizer | None = None
