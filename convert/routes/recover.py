"""Recover: from a QLoRA checkpoint back to a LoRA checkpoint of the full-precision base W16.

    teacher   dq + D, the function as trained: run once over the rows, then freed
    start     W16 + D + the best low-rank fit of dq - W16 (`correction`)
    student   the start, distilled for at most 200 steps on the user's rows (`distillation`)

What is written merges into W16 cleanly and can be trained on. The rows are split into those for training, those for
validation, which stop the training, and held-out rows. Three candidates are compared on the held-out rows by their full
KL, and the best is written: the adapter as it is on W16 (the naive merge), the start, and the student.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from convert.artifact import Recovery
from convert.detection.stamp import STAMP, stamp_document
from convert.detection.training import Training
from convert.errors import BaseMismatch, RouteRefused, TextUnreadable
from convert.inputs import lora
from convert.inputs.adapter_checkpoint import Checkpoint
from convert.inputs.base_model import BaseModel
from convert.plan.side_files import tokenizer_files
from convert.progress import Progress
from convert.quality import load
from convert.routes.activations import ActivationRecorder, Activations
from convert.routes.correction import (
    CorrectedLayer,
    adapter_shard,
    corrected_layers,
    corrections,
    write_adapter_config,
    write_layer,
)
from convert.routes.distillation import (
    DistillationExample,
    LoraMatrices,
    Student,
    TrainingSchedule,
    distill,
    log_probs,
)
from convert.routes.trained_adapter import TrainedAdapter, own_linears
from convert.safetensors_io.shards import ShardWriter
from convert.write.adapter import write_adapter
from convert.write.files import write_json, write_side_files

if TYPE_CHECKING:
    import torch

MAX_STEPS = 200
MAX_ROW_TOKENS = 256

_MIN_ROWS = 10
# The teacher's full distributions on held-out rows are kept: half a gigabyte at a vocabulary of 128k.
_MAX_HELD_OUT_TOKENS = 1024


@dataclass(frozen=True)
class RowSplit:
    """Rows of token ids (1, tokens), each in one part only."""

    training: tuple[torch.Tensor, ...]
    validation: tuple[torch.Tensor, ...]
    held_out: tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class _TeacherOutputs:
    """What is kept of the teacher.

    `held_out`: rows (1, tokens), each with its full log-probabilities (tokens - 1, vocabulary).
    """

    training: tuple[DistillationExample, ...]
    validation: tuple[DistillationExample, ...]
    held_out: tuple[tuple[torch.Tensor, torch.Tensor], ...]


def recover(
    directory: Path,
    trained: TrainedAdapter,
    rows: Sequence[Sequence[int]],
    rank: int,
    schedule: TrainingSchedule,
    progress: Progress,
) -> Recovery:
    """Write the LoRA checkpoint into the empty `directory`, in PEFT's layout, with graft_training.json beside it.

    `rows`: token ids of the user's texts, 10 different ones or more. One model is in memory at a time, in float32;
    on the GPU where there is one. Raises BaseMismatch for a base that isn't full precision, TextUnreadable for too
    few rows, RouteRefused for a rank or a number of steps that is out of range.
    """
    base = trained.base
    _require_possible(base, schedule)
    layers = corrected_layers(trained, base, rank)
    row_split = split(rows, schedule.steps * schedule.rows_per_step)
    teacher, activations = _run_teacher(trained, row_split, progress)
    start = _start(trained, layers, rank, activations, progress)
    del activations
    naive = _naive(trained.checkpoint, layers, rank)
    recovery, best = _distill_and_compare(base, naive, start, teacher, schedule, progress)
    if best is None:
        write_adapter(directory, trained.checkpoint, base.source(trained.checkpoint.base_name), progress)
    else:
        _write_matrices(directory, layers, best, rank, base.source(trained.checkpoint.base_name))
    _write_beside_adapter(directory, trained.checkpoint, base)
    return recovery


def split(rows: Sequence[Sequence[int]], max_training_rows: int) -> RowSplit:
    """Of every five different rows the last is held out, the third is for validation, the others are for training.

    Raises TextUnreadable for too few rows.
    """
    import torch

    unique = list(dict.fromkeys(tuple(row[:MAX_ROW_TOKENS]) for row in rows if len(row) > 1))
    if len(unique) < _MIN_ROWS:
        raise TextUnreadable(
            f"Recovering needs at least {_MIN_ROWS} different rows of two tokens or more, there are {len(unique)}: "
            "some are trained on, others are kept to measure on. Give more text like that of the fine-tune."
        )
    tensors = [torch.tensor([row]) for row in unique]
    training = [row for index, row in enumerate(tensors) if index % 5 not in (2, 4)]
    return RowSplit(tuple(training[:max_training_rows]), _truncated(tensors[2::5]), _truncated(tensors[4::5]))


def _truncated(rows: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The first _MAX_HELD_OUT_TOKENS tokens of the rows; no row of one token is left."""
    kept, tokens_left = [], _MAX_HELD_OUT_TOKENS
    for row in rows:
        if min(tokens_left, row.shape[1]) > 1:
            kept.append(row[:, :tokens_left])
            tokens_left -= row.shape[1]
    return tuple(kept)


def _require_possible(base: BaseModel, schedule: TrainingSchedule) -> None:
    if base.is_quantized:
        raise BaseMismatch(
            f"Recovering ends on the full-precision weights; {base.root} holds only a rounded form of them. "
            "Give the original model directory with --base."
        )
    if not 0 <= schedule.steps <= MAX_STEPS:
        raise RouteRefused(f"{schedule.steps} steps: recovering takes at most {MAX_STEPS}; beyond that, train on.")


def _run_teacher(
    trained: TrainedAdapter, row_split: RowSplit, progress: Progress
) -> tuple[_TeacherOutputs, Activations]:
    """Run the function as trained once over all rows. The activations are those of its layers on the training rows."""
    device = _device()
    model = trained.load().to(device)
    total = sum(map(len, (row_split.training, row_split.validation, row_split.held_out)))
    training: list[DistillationExample] = []
    with ActivationRecorder(model.get_base_model(), list(own_linears(trained.base))) as recorder:
        for row in row_split.training:
            progress("asking the teacher", len(training), total)
            training.append(DistillationExample.of(row, log_probs(model, row.to(device))))
    validation = tuple(DistillationExample.of(row, log_probs(model, row.to(device))) for row in row_split.validation)
    held_out = tuple((row, log_probs(model, row.to(device)).cpu()) for row in row_split.held_out)
    progress("asking the teacher", total, total)
    return _TeacherOutputs(tuple(training), validation, held_out), recorder.activations()


def _start(
    trained: TrainedAdapter,
    layers: Sequence[CorrectedLayer],
    rank: int,
    activations: Activations,
    progress: Progress,
) -> LoraMatrices:
    """The corrected adapter for W16, where the distillation starts."""
    matrices: LoraMatrices = {}
    for done, correction in enumerate(corrections(trained, trained.base, layers, rank, activations), start=1):
        matrices[correction.layer.module] = (correction.fit.a, correction.fit.b)
        progress("fitting the quantization error", done, len(layers))
    return matrices


def _naive(checkpoint: Checkpoint, layers: Sequence[CorrectedLayer], rank: int) -> LoraMatrices:
    """The adapter's own deltas, padded to the larger rank; zero where it has none."""
    import torch

    matrices: LoraMatrices = {}
    for layer in layers:
        if layer.lora_weights is None:
            matrices[layer.module] = (torch.zeros(rank, layer.in_features), torch.zeros(layer.out_features, rank))
            continue
        a, b = checkpoint.read(layer.lora_weights)
        matrices[layer.module] = lora.padded(a.float(), b.float() * layer.lora_weights.scaling, rank)
    return matrices


def _distill_and_compare(
    base: BaseModel,
    naive: LoraMatrices,
    start: LoraMatrices,
    teacher: _TeacherOutputs,
    schedule: TrainingSchedule,
    progress: Progress,
) -> tuple[Recovery, LoraMatrices | None]:
    """Measure both candidates, distil from the start, and return the best; None where that is the adapter as it is."""
    gc.collect()
    rank = len(next(iter(start.values()))[0])
    student = Student(load(base, None).to(_device()), list(start), rank)
    kl_naive = _held_out_kl(student, naive, teacher)
    kl_start = _held_out_kl(student, start, teacher)
    distilled = distill(student, teacher.training, teacher.validation, schedule, progress)
    best, steps, kl = distilled.matrices, distilled.best_step, _held_out_kl(student, distilled.matrices, teacher)
    if kl >= kl_start:
        best, steps, kl = start, 0, kl_start
    recovery = Recovery(rank=rank, steps=steps, kl_naive=kl_naive, kl_start=kl_start, kl_recovered=min(kl, kl_naive))
    return recovery, best if kl < kl_naive else None


def _held_out_kl(student: Student, matrices: LoraMatrices, teacher: _TeacherOutputs) -> float:
    """Mean KL(teacher || student) in nats per position on the held-out rows, of full distributions, in float64."""
    import torch

    student.load(matrices)
    divergences = []
    for row, teacher_log_probs in teacher.held_out:
        expected, actual = teacher_log_probs.double(), log_probs(student.model, row.to(_device())).cpu().double()
        divergences.append((expected.exp() * (expected - actual)).sum(-1).clamp_min(0))
    return float(torch.cat(divergences).mean())


def _write_matrices(
    directory: Path, layers: Sequence[CorrectedLayer], matrices: LoraMatrices, rank: int, source: str
) -> None:
    with ShardWriter(directory, adapter_shard(layers, rank)) as file:
        for layer in layers:
            write_layer(file, layer, *matrices[layer.module])
    write_adapter_config(directory, layers, rank, source)


def _write_beside_adapter(directory: Path, checkpoint: Checkpoint, base: BaseModel) -> None:
    """Write graft_training.json, and the tokenizer with its chat templates."""
    write_json(directory / STAMP, stamp_document(Training.LORA))
    write_side_files(directory, tokenizer_files(checkpoint, base))


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
