"""Writing the model directory of a plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from convert.base_model import CONFIG, BaseModel, Linear
from convert.checkpoint import Checkpoint, LoraPair
from convert.edits import edited
from convert.files import Threads, sync
from convert.formats import MODEL_STEM
from convert.journal import Journal
from convert.nf4 import Nf4
from convert.plan import Cast, Copied, Edited, Made, ModelPlan, Step, model_config
from convert.progress import Progress
from convert.reader import TensorReader
from convert.routes.stream import (
    Buffers,
    CopiedBytes,
    Delta,
    FloatSource,
    MergedRows,
    Nf4Source,
    Source,
    WholeTensors,
    Work,
    blocks,
    require_finite,
)
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
    journal: Journal | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Mapping[str, str]:
    """Weights, configuration, tokenizer. Returns the SHA-256 of the base's weight files, by name.

    Shards that the journal holds are kept as they are; each that gets finished is noted there. Memory: a few blocks
    of rows and one module's A and B; where a weight is quantized, that one weight.
    """
    shards = split((step.outputs for step in plan.steps), MODEL_STEM, shard_bytes)
    with TensorReader(base.tensors) as reader:
        _write_shards(directory, shards, plan, base, checkpoint, reader, progress, journal)
        base_files = reader.digests()
    if len(shards) > 1:
        write_json(directory / f"{MODEL_STEM}.safetensors.index.json", index(shards))
    write_json(directory / CONFIG, model_config(base, plan))
    for file in plan.files:
        copy_file(file, directory)
    return base_files


def _write_shards(
    directory: Path,
    shards: Sequence[Shard],
    plan: ModelPlan,
    base: BaseModel,
    checkpoint: Checkpoint,
    reader: TensorReader,
    progress: Progress,
    journal: Journal | None,
) -> None:
    missing = [shard for shard in shards if not (journal and journal.holds(directory / shard.file))]
    places = {spec.name: shard for shard in missing for spec in shard.specs}
    steps = [step for step in plan.steps if step.outputs[0].name in places]
    kept = len(plan.steps) - len(steps)
    works = (_work(step, plan, base, checkpoint) for step in steps)
    buffers = Buffers()
    with _Files(directory, journal) as files, closing(blocks(works, reader, buffers)) as made:
        for number, name, block in made:
            progress("writing weights", kept + number, len(plan.steps))
            files.append(places[name], name, block.bytes)
            buffers.give(block.buffer)
    progress("writing weights", len(plan.steps), len(plan.steps))


class _Files:
    """Shards written one after the other. One is noted in the journal as soon as it is complete; when the context is
    left all are durable. Not before: a disk that is told to make one durable has no time for the next."""

    def __init__(self, directory: Path, journal: Journal | None) -> None:
        self._directory, self._journal = directory, journal
        self._threads = Threads()
        self._complete: list[Path] = []
        self._open: tuple[Shard, ShardWriter] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with self._threads:
                if kind is None:
                    self._finish()
        finally:
            if self._open:
                self._open[1].close()
        for path in self._complete if kind is None else ():
            sync(path)

    def append(self, shard: Shard, name: str, piece: memoryview) -> None:
        """The next bytes of a tensor of this shard."""
        if self._open is None or self._open[0] is not shard:
            self._finish()
            self._open = shard, ShardWriter(self._directory, shard, self._threads)
        self._open[1].append(name, piece)

    def _finish(self) -> None:
        if self._open is None:
            return
        file = self._open[1]
        sha256 = file.complete()
        file.close()
        self._open = None
        self._complete.append(file.path)
        if self._journal:
            self._journal.note(file.path, sha256)


def _work(step: Step, plan: ModelPlan, base: BaseModel, checkpoint: Checkpoint) -> Work:
    match step:
        case Copied(spec):
            return CopiedBytes(spec)
        case Cast(spec):
            return MergedRows(FloatSource(base.tensors.specs[spec.name]), spec, None)
        case Made():
            source = None if step.stored or not step.edit.is_plain else _source(step.linear, plan, base)
            if source is None:
                return WholeTensors(lambda: _made(step, plan, base, checkpoint))
            return MergedRows(source, step.outputs[0], _delta(step.edit.pair, checkpoint))
        case Edited():
            return WholeTensors(lambda: _edited(step, base, checkpoint))


def _source(linear: Linear, plan: ModelPlan, base: BaseModel) -> Source | None:
    """The weights of training in rows; None where only the whole of them can be had."""
    if isinstance(linear.settings, Nf4):
        return Nf4Source(base, linear, linear.settings)
    simulated = plan.form.merged_onto and plan.form.quantizer and not (base.settings or linear.is_head)
    if linear.settings or simulated:
        return None
    return FloatSource(base.tensors.specs[linear.weight])


def _delta(pair: LoraPair | None, checkpoint: Checkpoint) -> Callable[[], Delta] | None:
    return (lambda: (*checkpoint.read(pair), pair.scaling)) if pair else None


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
    require_finite(linear.module, weight)
    if step.stored is None:
        yield linear.weight, weight
        return
    yield from step.stored.quantize(linear.module, weight).items()


def _edited(step: Edited, base: BaseModel, checkpoint: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
    weight = edited(base.tensors.read(step.source.name).float(), step.edit, checkpoint)
    weight = weight.to(_torch_dtype(step.spec.dtype))
    require_finite(step.spec.name, weight)
    yield step.spec.name, weight


def _torch_dtype(dtype: str) -> torch.dtype:
    import torch

    found: torch.dtype = getattr(torch, DTYPES[dtype][1])
    return found
