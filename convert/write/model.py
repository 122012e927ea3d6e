"""Writes the model directory of a plan: weights, configuration, tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from convert.artifact.durable_files import sync
from convert.artifact.file_names import CONFIG, MODEL_STEM
from convert.inputs.adapter_checkpoint import Checkpoint
from convert.inputs.base_model import BaseModel
from convert.plan.conversion_plan import ModelPlan, Step
from convert.progress import Progress
from convert.safetensors_io.direct_io import IoThreads
from convert.safetensors_io.reader import TensorReader
from convert.safetensors_io.shards import SHARD_BYTES, Shard, ShardWriter, index, split
from convert.safetensors_io.tensors import TensorSpec
from convert.write.blocks import Buffers
from convert.write.files import write_json, write_side_files
from convert.write.journal import Journal
from convert.write.step_tasks import StepTasks
from convert.write.stream import compute_blocks


def write_model(
    directory: Path,
    plan: ModelPlan,
    base: BaseModel,
    checkpoint: Checkpoint,
    progress: Progress,
    journal: Journal | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Mapping[str, str]:
    """Write all files of the directory. Returns the SHA-256 of the base's weight files, by name.

    Shards that the journal holds are kept; each shard that gets finished is added to it. Memory: a few blocks of rows
    and one module's A and B, or one whole weight while it is quantized.
    """
    shards = split((_in_file(step, base) for step in plan.steps), MODEL_STEM, shard_bytes)
    missing = [shard for shard in shards if not (journal and journal.holds(directory / shard.file))]
    with TensorReader(base.tensors) as reader:
        with _ShardFiles(directory, journal) as files:
            _write_shards(files, missing, StepTasks(plan, base, checkpoint), reader, progress)
        progress("writing weights", len(plan.steps), len(plan.steps))
        base_files = reader.digests()
    if len(shards) > 1:
        write_json(directory / f"{MODEL_STEM}.safetensors.index.json", index(shards))
    write_json(directory / CONFIG, plan.stop_tokens.config)
    write_side_files(directory, plan.stop_tokens.files)
    return base_files


def _in_file(step: Step, base: BaseModel) -> tuple[TensorSpec, ...]:
    """The outputs of a step with their names in the files, which are those of the base's files."""
    return tuple(replace(spec, name=base.file_name(spec.name)) for spec in step.outputs)


class _ShardFiles:
    """Shards that are written one after the other; each is added to the journal when it is complete.

    All shards are made durable at the end, since a disk that makes one durable can't write the next meanwhile.
    """

    def __init__(self, directory: Path, journal: Journal | None) -> None:
        self._directory, self._journal = directory, journal
        self._threads = IoThreads()
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
            self._journal.add(file.path, sha256)


def _write_shards(
    files: _ShardFiles, shards: Sequence[Shard], tasks: StepTasks, reader: TensorReader, progress: Progress
) -> None:
    shard_of = {spec.name: shard for shard in shards for spec in shard.specs}
    all_steps, file_name = tasks.plan.steps, tasks.base.file_name
    steps = [step for step in all_steps if file_name(step.outputs[0].name) in shard_of]
    kept = len(all_steps) - len(steps)
    buffers = Buffers()
    with closing(compute_blocks(map(tasks.task, steps), reader, buffers)) as outputs:
        for number, name, block in outputs:
            progress("writing weights", kept + number, len(all_steps))
            files.append(shard_of[file_name(name)], file_name(name), block.bytes)
            buffers.release(block.buffer)
