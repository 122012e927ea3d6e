"""Writing the model directory of a plan."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from convert.base_model import CONFIG, BaseModel
from convert.checkpoint import Checkpoint
from convert.edits import edited
from convert.errors import BaseMismatch
from convert.formats import MODEL_STEM
from convert.plan import Cast, Copied, Edited, Made, ModelPlan, Step, model_config
from convert.progress import Progress
from convert.shards import SHARD_BYTES, Shard, ShardWriter, index, split
from convert.tensors import DTYPES
from convert.writer import copy_file, write_json

if TYPE_CHECKING:
    import torch


def write_model(
    directory: Path,
    plan: ModelPlan,
    base: BaseModel,
    checkpoint: Checkpoint,
    progress: Progress,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Weights, configuration, tokenizer. One weight is in memory at a time."""
    shards = split((step.outputs for step in plan.steps), MODEL_STEM, shard_bytes)
    with ExitStack() as stack:
        places: dict[str, ShardWriter] = {}
        for shard in shards:
            places |= dict.fromkeys(_names(shard), stack.enter_context(ShardWriter(directory, shard)))
        for done, step in enumerate(plan.steps):
            progress("writing weights", done, len(plan.steps))
            _write_step(places, step, plan, base, checkpoint)
    progress("writing weights", len(plan.steps), len(plan.steps))
    if len(shards) > 1:
        write_json(directory / f"{MODEL_STEM}.safetensors.index.json", index(shards))
    write_json(directory / CONFIG, model_config(base, plan))
    for file in plan.files:
        copy_file(file, directory)


def _names(shard: Shard) -> list[str]:
    return [spec.name for spec in shard.specs]


def _write_step(
    places: dict[str, ShardWriter], step: Step, plan: ModelPlan, base: BaseModel, checkpoint: Checkpoint
) -> None:
    match step:
        case Copied(spec):
            places[spec.name].copy(spec.name, base.tensors.chunks(spec.name))
        case Cast(spec):
            tensor = base.tensors.read(spec.name).to(_torch_dtype(spec.dtype))
            _require_finite(spec.name, tensor)
            places[spec.name].write(spec.name, tensor)
        case Edited(source, edit, spec):
            tensor = edited(base.tensors.read(source.name).float(), edit, checkpoint).to(_torch_dtype(spec.dtype))
            _require_finite(spec.name, tensor)
            places[spec.name].write(spec.name, tensor)
        case Made():
            for name, tensor in _made(step, plan, base, checkpoint):
                places[name].write(name, tensor)


def _made(step: Made, plan: ModelPlan, base: BaseModel, checkpoint: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
    linear, form = step.linear, plan.form
    if form.merged_onto is None:
        weight = base.read_for_quantizing(linear)
    else:
        weight = base.read_as_trained(linear, form.quantizer)
    if not step.edit.is_empty:
        weight = edited(weight.float(), step.edit, checkpoint)
    if step.stored is None:
        weight = weight.to(_torch_dtype(step.outputs[0].dtype))
    _require_finite(linear.module, weight)
    if step.stored is None:
        yield linear.weight, weight
        return
    yield from step.stored.quantize(linear.module, weight).items()


def _require_finite(name: str, tensor: torch.Tensor) -> None:
    if not tensor.isfinite().all():
        raise BaseMismatch(
            f"{name}: weights are not finite in {tensor.dtype}: the base is broken, or its weights or their sum with "
            "the delta are too large for this type; --dtype bfloat16 holds larger ones."
        )


def _torch_dtype(dtype: str) -> torch.dtype:
    import torch

    found: torch.dtype = getattr(torch, DTYPES[dtype][1])
    return found
