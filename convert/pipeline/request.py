"""The user's request, and every check that is made before the first byte is written."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from convert.artifact import QuantizationName
from convert.detection.detect import Detection, detect, stated_by_user
from convert.detection.quantization_alignment import measure_training
from convert.detection.training import Training
from convert.errors import QualityGateFailed, RouteRefused
from convert.inputs.adapter_checkpoint import Checkpoint
from convert.inputs.base_model import BaseModel
from convert.inputs.chat.answer_format import AnswerFormat
from convert.plan.compatibility import require_compatible
from convert.plan.conversion_plan import ModelPlan, plan_model
from convert.plan.machine import require_memory
from convert.plan.phases import Phase
from convert.plan.stop_tokens import open_tokenizer
from convert.plan.weight_updates import WeightUpdates
from convert.progress import Progress
from convert.quality import (
    Canary,
    Gate,
    MeasuredModels,
    Text,
    Tokenizer,
    open_canaries,
    require_applicable,
    tokenize,
)
from convert.quantization.compressed import Compressed
from convert.quantization.format import QuantizationFormat
from convert.quantization.nf4 import Nf4
from convert.quantization.targets import merged_order, require_known, require_works, target_here
from convert.routes.choose import (
    Choice,
    RouteOptions,
    choose,
    requested_variants,
    trained_quantizer,
    with_weight_updates,
)
from convert.routes.low_rank import default_rank, require_rank
from convert.routes.variants import RouteVariant, Storage
from convert.safetensors_io.shards import SHARD_BYTES

Method = Literal["rtn", "gptq", "awq"]
"""How integer weights are found: rounding to nearest, or GPTQ or AWQ with calibration text."""

_TRAINED_ON = {Training.QLORA: "4bit", Training.LORA: "full"}


@dataclass(frozen=True)
class Request:
    """The request of `plan`, `run` and `compare`; docs/reference/command-line.md explains every option."""

    checkpoint: Path
    base: Path
    route_options: RouteOptions = field(default_factory=RouteOptions)
    target: str | None = None
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

    def command(self) -> str:
        """The command line of `run` without the options of the route, to be pasted into a shell."""
        return run_command(self.checkpoint, str(self.base), self.trained_on)


def run_command(checkpoint: Path, base: str, trained_on: Training | None) -> str:
    """The command line that converts `checkpoint` onto `base` into the directory DIR, quoted for a shell."""
    words = ["python", "-m", "convert", "run", str(checkpoint), "--base", base, "--out", "DIR"]
    if trained_on in _TRAINED_ON:
        words += ["--trained-on", _TRAINED_ON[trained_on]]
    return shlex.join(words)


@dataclass(frozen=True)
class Candidate:
    """A route variant that this checkpoint, base and target can carry.

    `plan`: everything that will be written of the model; None where another artifact's model is referenced. `rank`: of
    the adapter that `rebase` or `recover` computes; None for the other routes.
    """

    choice: Choice
    plan: ModelPlan | None
    rank: int | None = None

    @property
    def variant(self) -> RouteVariant:
        return self.choice.variant

    @property
    def quantization(self) -> QuantizationName:
        return _output_quantization(self.choice)


@dataclass(frozen=True)
class PreparedRequest:
    """A request whose input has been read and checked."""

    request: Request
    target: str
    text: Text
    calibration: Text | None
    canaries: tuple[Canary, ...]
    checkpoint: Checkpoint
    detection: Detection
    base: BaseModel
    tokenizer: Tokenizer  # with the chat template that the fine-tune used

    @property
    def quantizer(self) -> Nf4 | None:
        """The quantizer of the base in training; None for LoRA."""
        return trained_quantizer(self.detection, self.base)

    @property
    def rank(self) -> int:
        """The rank of an adapter that `rebase` or `recover` computes."""
        return self.request.rank or default_rank(self._trained_rank)

    @property
    def _trained_rank(self) -> int:
        return max(self.checkpoint.ranks, default=0)

    @property
    def base_source(self) -> str:
        """The base as the checkpoint or the user names it; never a local path."""
        return self.base.source(self.checkpoint.base_name)

    def open_variants(self) -> tuple[RouteVariant, ...]:
        """The variants that the options leave open, in the order in which they are tried.

        Raises RouteRefused, which names the variants that work.
        """
        order = merged_order(self.target)
        request = self.request
        return requested_variants(
            self.detection.training,
            request.route_options,
            order,
            request.command(),
            shares_16_bits=self.base.artifact is not None and not self.base.is_quantized,
        )

    def candidate(self, variant: RouteVariant) -> Candidate:
        """The variant with its plan. Raises ConvertError where checkpoint, base or target can't carry it."""
        self.checkpoint.require_route(variant.route)
        quantization = quantization_format(variant.storage, self.base)
        choice = choose(variant, self.detection, self.base, self.request.route_options, quantization)
        with_adapter = variant.route in ("adapter", "rebase")
        shapes = {linear.shape for linear in self.base.layer_linears}
        require_works(self.target, _output_quantization(choice), shapes, with_adapter=with_adapter)
        self._require_calibration(variant)
        rank = self.rank if variant.route in ("rebase", "recover") else None
        if rank:
            require_rank(rank, self._trained_rank)
            choice = replace(choice, reason=f"{choice.reason} {self._rank_reason(rank)}")
        updates = WeightUpdates.of(self.checkpoint, self.base, separate=variant.route in ("adapter", "rebase"))
        choice = with_weight_updates(choice, self.base, updates)
        output_format = choice.output_format
        plan = plan_model(self.base, output_format, self.checkpoint, updates) if output_format else None
        return Candidate(choice, plan, rank)

    def _rank_reason(self, rank: int) -> str:
        trained = self._trained_rank
        if rank == trained:
            return f"The new adapter has rank {rank}, as the trained one: nothing is left for a correction."
        return f"The new adapter has rank {rank}, of which {rank - trained} are for the correction."

    def _require_calibration(self, variant: RouteVariant) -> None:
        """Raises RouteRefused where the method doesn't fit the storage, or lacks its text."""
        method = self.request.method
        if method != "rtn" and variant.storage not in ("w4a16", "w8a8-int8"):
            raise RouteRefused(
                f"--method {method} is for --quantize w4a16 and w8a8-int8, not for {variant.storage_name}."
            )
        if method != "rtn" and self.base.architecture.other_parts:
            raise RouteRefused(
                f"--method {method} is for models of text alone: llm-compressor would quantize more than the language "
                "model. Take --method rtn."
            )
        if method != "rtn" and self.calibration is None:
            raise RouteRefused(
                f"--method {method} needs text to calibrate on, like what it will be used on: --calibration."
            )
        if variant.route == "recover" and self.calibration is None:
            raise RouteRefused(
                "Recovering distils on text like that of the fine-tune, which must not be the text of --text: "
                "give it with --calibration FILE."
            )


def prepare(request: Request, progress: Progress) -> PreparedRequest:
    """Open every input, and find out how the adapter was trained. Raises ConvertError."""
    text = Text.open(request.text)
    calibration = Text.open(request.calibration) if request.calibration else None
    _require_apart(text, calibration)
    canaries = open_canaries(request.canaries) if request.canaries else ()
    checkpoint = Checkpoint.open(request.checkpoint)
    checkpoint.require_supported()
    base = BaseModel.open(request.base)
    checkpoint = checkpoint.named_as(base.architecture)
    tokenizer = usable_tokenizer(checkpoint, base)
    detection = _detect_training(request, checkpoint, base, tokenizer, text, progress)
    target = request.target or target_here()
    require_known(target)
    return PreparedRequest(request, target, text, calibration, canaries, checkpoint, detection, base, tokenizer)


def usable_tokenizer(checkpoint: Checkpoint, base: BaseModel) -> Tokenizer:
    """The tokenizer with the chat template that the fine-tune used. Reads no weights.

    Raises ConvertError where no variant can be made of this pair: the adapter was not trained on this base, the
    libraries make no model of them, or the tokenizer or its chat template can't be used.
    """
    require_compatible(checkpoint, base)
    require_applicable(checkpoint, base)
    tokenizer = open_tokenizer(checkpoint, base)
    AnswerFormat.of(tokenizer)
    return tokenizer


def _output_quantization(choice: Choice) -> QuantizationName:
    """How the linear layers of the model will be stored. A referenced base may be stored in its own way."""
    output_format = choice.output_format
    if output_format and output_format.quantization_format:
        return output_format.quantization_format.name
    return "nf4-double" if choice.variant.storage == "nf4" else choice.variant.storage


def quantization_format(storage: Storage, base: BaseModel) -> QuantizationFormat | None:
    """The format in which the linear layers of this base are stored; None for 16 bits."""
    if storage == "none":
        return None
    if storage == "nf4":
        return Nf4(True, base.dtype)
    widths = [linear.in_features for linear in base.layer_linears]
    return Compressed.fitting(storage, widths, base.dtype)


def _detect_training(
    request: Request,
    checkpoint: Checkpoint,
    base: BaseModel,
    tokenizer: Tokenizer,
    text: Text,
    progress: Progress,
) -> Detection:
    """The user's statement, else the trainer's files, else a measurement of the weights and on the user's text."""
    detection = detect(checkpoint)
    if request.trained_on:
        detection = stated_by_user(request.trained_on, detection)
    elif detection.training is Training.UNKNOWN and request.measure and not base.is_quantized:
        # Losses can decide only on the user's own text: an adapter fits its base on what it was trained on.
        tokens = tokenize(text, tokenizer) if request.text else None
        if tokens:
            _require_memory_for_losses(checkpoint, base, sum(row.shape[1] for row in tokens.all))
        measured = measure_training(checkpoint, base, tokens, progress)
        detection = Detection(measured.training, measured.sources, None, measured.confidence)
    return detection.require_known(request.checkpoint)


def _require_memory_for_losses(checkpoint: Checkpoint, base: BaseModel, tokens: int) -> None:
    """Raises MemoryShort where the comparison of losses, which tells LoRA from QLoRA, does not fit."""
    needed = MeasuredModels(base, checkpoint, None, tokens).reference_bytes()
    remedy = "Say it with --trained-on 4bit or full, then it is not measured; or free some."
    require_memory([Phase("Finding out how the adapter was trained", needed, remedy=remedy)])


def _require_apart(text: Text, calibration: Text | None) -> None:
    """Raises QualityGateFailed where a row is in both texts."""
    if calibration and (shared := sum(row in text.rows for row in calibration.rows)):
        raise QualityGateFailed(
            f"{shared} rows of --calibration are also in the text that is measured on: a result measured on what it "
            "was fitted to says nothing. Give each its own rows."
        )
