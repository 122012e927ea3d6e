"""A conversion asked for in one line, as most tests do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from convert.artifact import Artifact
from convert.detection.training import Training
from convert.pipeline import convert as pipeline
from convert.pipeline.convert import Destination
from convert.pipeline.request import Request as FullRequest
from convert.progress import Progress, silent
from convert.quality import Gate
from convert.routes.choose import RouteOptions
from convert.routes.variants import DtypeOption, OntoOption, QuantizeOption, RouteOption
from convert.safetensors_io.shards import SHARD_BYTES


@dataclass(frozen=True)
class Request:
    checkpoint: Path
    base: Path
    destination: Path
    name: str = "tiny"
    route: RouteOption = "auto"
    quantize: QuantizeOption = "auto"
    onto: OntoOption = "auto"
    dtype: DtypeOption = "auto"
    force: bool = False
    trained_on: Training | None = None
    text: Path | None = None
    canaries: Path | None = None
    calibration: Path | None = None
    max_kl: float | None = None
    measure: bool = True
    target: str | None = "cpu"
    rank: int | None = None
    steps: int = 60
    shard_bytes: int = SHARD_BYTES

    @property
    def full(self) -> FullRequest:
        return FullRequest(
            checkpoint=self.checkpoint,
            base=self.base,
            route_options=RouteOptions(self.route, self.quantize, self.onto, self.dtype, self.force),
            target=self.target,
            rank=self.rank,
            steps=self.steps,
            calibration=self.calibration,
            trained_on=self.trained_on,
            text=self.text,
            canaries=self.canaries,
            gate=Gate(max_kl=self.max_kl),
            measure=self.measure,
            shard_bytes=self.shard_bytes,
        )


def convert(request: Request, progress: Progress = silent) -> Artifact:
    return pipeline.convert(request.full, Destination(request.destination, request.name), progress)
