"""`inspect`: finds out what a checkpoint is and which route variants it has, without loading a model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from convert.detection.detect import Detection, detect, stated_by_user
from convert.detection.training import Training
from convert.errors import CheckpointUnsupported, ConvertError
from convert.inputs.adapter_checkpoint import Checkpoint
from convert.inputs.base_model import BaseModel
from convert.inputs.trainer_files import public_name
from convert.pipeline.request import quantization_format, run_command, usable_tokenizer
from convert.plan.conversion_plan import plan_model
from convert.plan.weight_updates import WeightUpdates
from convert.routes.choose import RouteOptions, choose, with_weight_updates
from convert.routes.variants import RouteVariant, offered_variants


@dataclass(frozen=True)
class Offer:
    """A variant with its command line.

    `output_bytes`: None without a base. `obstacle`: why the variant is not possible; None where it is.
    """

    variant: RouteVariant
    command: str
    default: bool
    output_bytes: int | None
    obstacle: str | None


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found. `offers` is empty where `problems` make every conversion impossible.

    `obstacle`: with a base, why none of the offers is possible; None where one is.
    """

    checkpoint: Checkpoint
    detection: Detection
    problems: tuple[str, ...]
    offers: tuple[Offer, ...]
    obstacle: ConvertError | None = None

    @property
    def base_name(self) -> str:
        return public_name(self.checkpoint.base_name) if self.checkpoint.base_name else "not named"


def inspect(root: Path, base_root: Path | None) -> Inspection:
    """Raises ConvertError where the checkpoint or the base can't be read; every other problem is in the result."""
    checkpoint = Checkpoint.open(root)
    detection = detect(checkpoint)
    base = BaseModel.open(base_root) if base_root else None
    checkpoint = checkpoint.named_as(base.architecture) if base else checkpoint
    problems = checkpoint.all_problems + _quantizer_problems(root, detection)
    if problems:
        return Inspection(checkpoint, detection, problems, ())
    common = _common_obstacle(checkpoint, base) if base else None
    obstacles: list[ConvertError] = []
    offers: list[Offer] = []
    for variant in offered_variants(detection.training):
        try:
            size = _size(variant, checkpoint, detection, base, common)
            offers.append(_offer(variant, checkpoint, detection, base_root, size))
        except ConvertError as error:
            obstacles.append(error)
            offers.append(replace(_offer(variant, checkpoint, detection, base_root), obstacle=str(error)))
    stopped = base is not None and len(obstacles) == len(offers)
    return Inspection(checkpoint, detection, (), tuple(offers), obstacles[-1] if stopped else None)


def _common_obstacle(checkpoint: Checkpoint, base: BaseModel) -> ConvertError | None:
    try:
        usable_tokenizer(checkpoint, base)
    except ConvertError as error:
        return error
    return None


def _quantizer_problems(root: Path, detection: Detection) -> tuple[str, ...]:
    if detection.training is Training.UNKNOWN:
        return ()
    try:
        detection.require_known(root)
    except CheckpointUnsupported as error:
        return (str(error),)
    return ()


def _offer(
    variant: RouteVariant,
    checkpoint: Checkpoint,
    detection: Detection,
    base_root: Path | None,
    size: int | None = None,
) -> Offer:
    is_known = detection.training is not Training.UNKNOWN
    command = run_command(checkpoint.root, str(base_root or "BASE"), None if is_known else variant.training)
    default = variant.is_exact and variant.training is detection.training is Training.QLORA
    return Offer(variant, command if default else f"{command} {variant.flags}", default, size, None)


def _size(
    variant: RouteVariant,
    checkpoint: Checkpoint,
    detection: Detection,
    base: BaseModel | None,
    common: ConvertError | None,
) -> int | None:
    """Bytes of the result; None without a base. Raises ConvertError where the variant is not possible."""
    checkpoint.require_route(variant.route)
    if base is None:
        return None
    if common:
        raise common
    is_known = detection.training is not Training.UNKNOWN
    assumed = detection if is_known else stated_by_user(variant.training, detection)
    choice = choose(variant, assumed, base, RouteOptions(), quantization_format(variant.storage, base))
    updates = WeightUpdates.of(checkpoint, base, separate=variant.route in ("adapter", "rebase"))
    output_format = with_weight_updates(choice, base, updates).output_format
    model_bytes = plan_model(base, output_format, checkpoint, updates).weight_bytes if output_format else 0
    return model_bytes + (checkpoint.weight_bytes if variant.route == "adapter" else 0)
