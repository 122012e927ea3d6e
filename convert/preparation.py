"""What is asked for, and everything that is checked before the first byte is written."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from convert.artifact import QuantizationName
from convert.base_model import BaseModel
from convert.checkpoint import Checkpoint
from convert.compressed import Compressed
from convert.detect import Detection, Training, detect, told
from convert.edits import Edits
from convert.errors import QualityGateFailed, RouteRefused
from convert.match import require_match
from convert.nf4 import Nf4
from convert.plan import ModelPlan, plan_model
from convert.progress import Progress
from convert.provenance import measured
from convert.quality import Canary, Gate, Text, Tokenizer, open_canaries, token_rows
from convert.routes.choose import Choice, Wish, choose, trained_quantizer, ways_asked, with_baked
from convert.routes.ways import Storage, Way
from convert.scheme import Scheme
from convert.shards import SHARD_BYTES
from convert.targets import merged_order, require_known, require_works, target_here

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
    shard_bytes: int = SHARD_BYTES

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
    target: str
    text: Text
    calibration: Text | None
    canaries: tuple[Canary, ...]
    checkpoint: Checkpoint
    found: Detection
    base: BaseModel

    @property
    def quantizer(self) -> Nf4 | None:
        """What the base went through in training; None for LoRA."""
        return trained_quantizer(self.found, self.base)

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
        require_match(self.checkpoint, self.base)
        require_works(self.target, stored_as(way, choice), with_adapter=way.route in ("adapter", "rebase"))
        if request.method != "rtn":
            _require_calibrated(way, request.method, self.calibration)
        if way.route == "recover" and self.calibration is None:
            raise RouteRefused(
                "Recovering distils on text like that of the fine-tune, other than what is measured on: "
                "give it with --calibration FILE."
            )
        edits = Edits.of(self.checkpoint, self.base, separate=way.route == "adapter")
        choice = with_baked(choice, self.base, edits)
        plan = plan_model(self.base, choice.form, self.checkpoint, edits) if choice.form else None
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
    target = request.target or target_here()
    require_known(target)
    return Job(request, target, text, calibration, canaries, checkpoint, found, base)


def scheme_of(storage: Storage, base: BaseModel) -> Scheme | None:
    """The quantizer of a storage, for this base; None for 16 bits."""
    if storage == "none":
        return None
    if storage == "nf4":
        return Nf4(True, base.dtype)
    widths = [linear.in_features for linear in base.linears.values() if not linear.is_head]
    return Compressed.fitting(storage, widths, base.dtype)


def _training(request: Request, checkpoint: Checkpoint, base: BaseModel, text: Text, progress: Progress) -> Detection:
    """The user's word, else the evidence, else what the weights and the user's text tell."""
    found = detect(checkpoint)
    if request.trained_on:
        found = told(request.trained_on, found)
    elif found.training is Training.UNKNOWN and request.measure and not base.is_quantized:
        found = _measured_training(request, checkpoint, base, text, progress)
    return found.require_known(request.checkpoint)


def _measured_training(
    request: Request, checkpoint: Checkpoint, base: BaseModel, text: Text, progress: Progress
) -> Detection:
    """Function evidence only on the user's own text: of a text that has nothing to do with it, either may be right."""
    tokenizer = checkpoint.root if checkpoint.tokenizer_files else base.root
    rows = token_rows(text, Tokenizer.open(tokenizer)) if request.text else None
    outcome = measured(checkpoint, base, rows, progress)
    return Detection(outcome.verdict, outcome.lines, None)


def stored_as(way: Way, choice: Choice) -> QuantizationName:
    """How the model will be stored, whose form may be that of the base that was given."""
    if choice.form and choice.form.stored:
        return choice.form.stored.name
    return "nf4-double" if way.storage == "nf4" else way.storage


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
        raise RouteRefused(
            f"--method {method} needs text to calibrate on, like what it will be used on: --calibration."
        )
