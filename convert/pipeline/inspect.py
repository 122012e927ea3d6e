"""`inspect`: finds out what a checkpoint is and which route variants it has, without loading a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from convert.detection.detect import Detection, detect, stated_by_user
from convert.detection.training import Training
from convert.errors import CheckpointUnsupported, ConvertError
from convert.inputs.adapter_checkpoint import Checkpoint
from convert.inputs.base_model import BaseModel, public_name
from convert.pipeline.request import quantization_format, run_command
from convert.plan.compatibility import require_compatible
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
    """What `inspect` found. `offers` is empty where `problems` make every conversion impossible."""

    checkpoint: Checkpoint
    detection: Detection
    problems: tuple[str, ...]
    offers: tuple[Offer, ...]

    @property
    def base_name(self) -> str:
        return public_name(self.checkpoint.base_name) if self.checkpoint.base_name else "not named"


def inspect(root: Path, base_root: Path | None) -> Inspection:
    """Raises ConvertError where the checkpoint or the base can't be read; every other problem is in the result."""
    checkpoint = Checkpoint.open(root)
    detection = detect(checkpoint)
    base = BaseModel.open(base_root) if base_root else None
    problems = checkpoint.all_problems + _quantizer_problems(root, detection)
    offers: tuple[Offer, ...] = ()
    if not problems:
        variants = offered_variants(detection.training)
        offers = tuple(_offer(variant, checkpoint, detection, base, base_root) for variant in variants)
    return Inspection(checkpoint, detection, problems, offers)


def _quantizer_problems(root: Path, detection: Detection) -> tuple[str, ...]:
    if detection.training is Training.UNKNOWN:
        return ()
    try:
        detection.require_known(root)
    except CheckpointUnsupported as error:
        return (str(error),)
    return ()


def _offer(
    variant: RouteVariant, checkpoint: Checkpoint, detection: Detection, base: BaseModel | None, base_root: Path | None
) -> Offer:
    is_known = detection.training is not Training.UNKNOWN
    assumed = detection if is_known else stated_by_user(variant.training, detection)
    stated = None if is_known else variant.training
    command = run_command(checkpoint.root, str(base_root or "BASE"), stated)
    default = variant.is_exact and variant.training is detection.training is Training.QLORA
    obstacle = "; ".join(checkpoint.problems_for(variant.route)) or None
    size = None
    if base and not obstacle:
        size, obstacle = _size(variant, checkpoint, assumed, base)
    return Offer(variant, command if default else f"{command} {variant.flags}", default, size, obstacle)


def _size(
    variant: RouteVariant, checkpoint: Checkpoint, detection: Detection, base: BaseModel
) -> tuple[int | None, str | None]:
    """Bytes of the result, or why there is none."""
    try:
        quantization = quantization_format(variant.storage, base)
        choice = choose(variant, detection, base, RouteOptions(), quantization)
        require_compatible(checkpoint, base)
        updates = WeightUpdates.of(checkpoint, base, separate=variant.route == "adapter")
        output_format = with_weight_updates(choice, base, updates).output_format
        model_bytes = plan_model(base, output_format, checkpoint, updates).weight_bytes if output_format else 0
    except ConvertError as error:
        return None, str(error)
    return model_bytes + (checkpoint.weight_bytes if variant.route == "adapter" else 0), None
