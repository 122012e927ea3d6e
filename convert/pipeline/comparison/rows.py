"""The values that a comparison holds: one row for each variant."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from convert.artifact import Base, Origin, Quality, QuantizationName, Recovery, RouteName
from convert.quality import Answer, ModelRetention


@dataclass(frozen=True)
class Row:
    """One variant, built and measured. `failures`: the gate's sentences, none where the variant passes."""

    label: str
    command: str
    route: RouteName
    quantization: QuantizationName
    size_bytes: int
    quality: Quality
    failures: tuple[str, ...] = ()
    chosen: bool = False
    decode_tokens_per_s: float | None = None
    recovery: Recovery | None = None
    retained: ModelRetention | None = None
    answers: tuple[Answer, ...] = ()

    @property
    def passes(self) -> bool:
        return not self.failures


@dataclass(frozen=True)
class Comparison:
    """Variants of one checkpoint, measured on one text. `answers`: by the function as trained, to the canaries."""

    name: str
    origin: Origin
    base: Base | None
    rows: tuple[Row, ...]
    answers: tuple[Answer, ...] = ()
    versions: Mapping[str, str] | None = None

    @property
    def chosen(self) -> Row | None:
        return next((row for row in self.rows if row.chosen), None)
