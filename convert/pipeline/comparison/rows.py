"""What is compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from convert.artifact import Base, Origin, Quality, QuantizationName, Recovery, RouteName
from convert.quality import Answer, Retained


@dataclass(frozen=True)
class Row:
    """One way, made and measured. `failures`: the gate's sentences, none where it is passed."""

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
    retained: Retained | None = None
    answers: tuple[Answer, ...] = ()

    @property
    def passes(self) -> bool:
        return not self.failures


@dataclass(frozen=True)
class Comparison:
    """Ways of one checkpoint on one text. `answers`: of the function as trained, to the canaries."""

    name: str
    origin: Origin
    base: Base | None
    rows: tuple[Row, ...]
    answers: tuple[Answer, ...] = ()
    versions: Mapping[str, str] | None = None

    @property
    def chosen(self) -> Row | None:
        return next((row for row in self.rows if row.chosen), None)
