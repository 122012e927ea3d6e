"""What is asked for, and everything that is checked before the first byte is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from convert.base_model import BaseModel
from convert.checkpoint import Checkpoint
from convert.compressed import Compressed
from convert.detect import Detection, Training, detect, told
from convert.errors import ConvertError, QualityGateFailed, RouteRefused
from convert.nf4 import Nf4
from convert.plan import ModelPlan, plan_model, require_match
from convert.progress import Progress
from convert.provenance import measured
from convert.quality import Canary, Gate, Text, open_canaries
from convert.routes.choose import Choice, Wish, choose, ways_asked
from convert.routes.ways import Storage, Way
from convert.scheme import Scheme
from convert.targets import Target, merged_order, require_served, target

Method = Literal["rtn", "gptq", "awq"]

# What `auto` calls good enough where the user sets no limits.
AUTO_GATE = Gate(max_kl=0.05, min_gain=0.95)
_LEAST_RANK = 64


@dataclass(frozen=True)
class Request:
    """What the user asks for."""

    checkpoint: Path
    base: Path
    wish: Wish = field(default_factory=Wish)
    target: str | None = None
    onto: Path | None = None
    rank: int | None = None
    steps: int = 60
    method: Method = "rtn"
    calibration: Path | None = None
    trained_on: Training | None = None
    text: Path | None = None
    canaries: Path | None = None
    gate: Gate = field(default_factory=Gate)
    measure: bool = True

    def command(self, verb: str = "run", rest: str = " --out DIR") -> str:
        """The command line without the options of the wish."""
        words = {Training.QLORA: " --trained-on 4bit", Training.LORA: " --trained-on full"}
        word = words.get(self.trained_on, "") if self.trained_on else ""
        return f"python -m convert {verb} {self.checkpoint} --base {self.base}{rest}{word}"


@dataclass(frozen=True)
class Candidate:
    """A way that is open, with everything that will be written of the model; None: another artifact's is used."""

    choice: Choice
    plan: ModelPlan | None

    @property
    def way(self) -> Way:
        return self.choice.way


@dataclass(frozen=True)
class Job:
    """A request whose input has been read and checked."""

    request: Request
    target: Target
    text: Text
    calibration: Text | None
    canaries: tuple[Canary, ...]
    checkpoint: Checkpoint
    found: Detection
    base: BaseModel

    @property
    def rank(self) -> int:
        """Of a corrected adapter."""
        return self.request.rank or max(_LEAST_RANK, 2 * max(self.checkpoint.ranks))

    def open_ways(self) -> tuple[Way, ...]:
        """What the wish leaves open, first to be tried first. Raises RouteRefused naming the ways that work."""
        order = merged_order(self.target)
        return ways_asked(self.found.training, self.request.wish, order, self.request.command())

    def candidate(self, way: Way) -> Candidate:
        """The way with its plan. Raises ConvertError where checkpoint, base or target can't carry it."""
        request = self.request
        self.checkpoint.require_route(way.route)
        scheme = scheme_of(way.storage, self.base)
        choice = choose(way, self.found, self.base, request.wish, scheme)
        require_match(self.checkpoint, self.base, merging=way.route in ("merge", "recover"))
        require_served(self.target, way.storage, adapter=way.route in ("adapter", "rebase"))
        if request.method != "rtn":
            _require_calibrated(way, request.method, self.calibration)
        if way.route == "recover" and self.calibration is None:
            raise RouteRefused(
                "Recovering distils on text like that of the fine-tune, other than what is measured on: "
                "give it with --calibration FILE."
            )
        plan = plan_model(self.base, choice.form, self.checkpoint) if choice.form else None
        return Candidate(choice, plan)


def prepare(request: Request, progress: Progress) -> Job:
    """Open everything and find out how it was trained. Raises ConvertError."""
    text = Text.open(request.text)
    calibration = Text.open(request.calibration) if request.calibration else None
    _require_apart(text, calibration)
    canaries = open_canaries(request.canaries) if request.canaries else ()
    checkpoint = Checkpoint.open(request.checkpoint)
    checkpoint.require_supported()
    base = BaseModel.open(request.base)
    found = _training(request, checkpoint, base, text, progress)
    return Job(request, target(request.target), text, calibration, canaries, checkpoint, found, base)


def scheme_of(storage: Storage, base: BaseModel) -> Scheme | None:
    """The quantizer of a storage, for this base; None for 16 bits."""
    if storage == "none":
        return None
    if storage == "nf4":
        return Nf4(True, base.dtype)
    widths = [linear.in_features for linear in base.linears.values() if not linear.is_head]
    return Compressed.fitting(storage, widths, base.dtype)


def possible(job: Job, ways: tuple[Way, ...]) -> tuple[tuple[Candidate, ...], tuple[str, ...]]:
    """The candidates among some ways, and for each of the others why it is none."""
    found, obstacles = [], []
    for way in ways:
        try:
            found.append(job.candidate(way))
        except ConvertError as error:
            obstacles.append(f"{way.flags}: {error}")
    return tuple(found), tuple(obstacles)


def _training(
    request: Request, checkpoint: Checkpoint, base: BaseModel, text: Text, progress: Progress
) -> Detection:
    """The user's word, else the evidence, else what the weights and the user's text tell."""
    found = detect(checkpoint)
    if request.trained_on:
        found = told(request.trained_on, found)
    elif found.training is Training.UNKNOWN and request.measure and not base.is_quantized:
        found = measured(checkpoint, base, text if request.text else None, progress).detection(found)
    return found.require_known(request.checkpoint)


def _require_apart(text: Text, calibration: Text | None) -> None:
    if calibration and (shared := sum(row in text.rows for row in calibration.rows)):
        raise QualityGateFailed(
            f"{shared} rows of --calibration are also in the text that is measured on: a result measured on what it "
            "was fitted to says nothing. Give each its own rows."
        )


def _require_calibrated(way: Way, method: Method, calibration: Text | None) -> None:
    if way.storage not in ("w4a16", "w8a8-int8"):
        raise RouteRefused(f"--method {method} is for --quantize w4a16 and w8a8-int8, not for {way.stored}.")
    if calibration is None:
        raise RouteRefused(f"--method {method} needs text to calibrate on, like that it will be used on: --calibration FILE.")
