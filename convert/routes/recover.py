"""Recover: from a QLoRA checkpoint back to a LoRA checkpoint of the full-precision base W16.

    teacher   dq + D, the function as trained: run once over the rows, then freed
    start     W16 + D + the best low-rank fit of dq - W16 (`lowrank`)
    student   the start, distilled for at most 200 steps on the user's rows (`distill`)

What is written merges into W16 cleanly and can be trained on. Rows are split: trained on, watched for the stop, held
out. The three candidates - the adapter as it is on W16, the start, the student - are compared on the held-out rows by
their full KL, and the best is written.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert import lora
from convert.artifact import Recovery
from convert.as_trained import with_adapter
from convert.base_model import BaseModel
from convert.checkpoint import Checkpoint
from convert.distill import Course, Halves, Lesson, distill, log_probs, lora_model, set_halves
from convert.errors import BaseMismatch, RouteRefused, TextUnreadable
from convert.evidence import STAMP, Training, stamp
from convert.formats import ADAPTER_CONFIG, ADAPTER_STEM
from convert.lowrank import InputRecorder, Inputs
from convert.nf4 import Nf4
from convert.progress import Progress
from convert.quality import load
from convert.routes.adapter import write_adapter
from convert.routes.rebase import Target, adapter_config, corrected, targets
from convert.shards import Shard, ShardWriter
from convert.writer import copy_file, write_json

if TYPE_CHECKING:
    import torch

MAX_STEPS = 200

_MAX_ROW_TOKENS = 256
_MIN_ROWS = 10
# The teacher's full distributions on held-out rows are kept: half a gigabyte of a vocabulary of 128k.
_MAX_HELD_TOKENS = 1024


@dataclass(frozen=True)
class Rows:
    """Rows of token ids (1, tokens), each in one part only."""

    trained: tuple[torch.Tensor, ...]
    watched: tuple[torch.Tensor, ...]
    held: tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class _Taught:
    """Everything the teacher leaves behind."""

    lessons: tuple[Lesson, ...]
    watched: tuple[Lesson, ...]
    held: tuple[torch.Tensor, ...]
    inputs: Inputs


def recover(
    directory: Path,
    checkpoint: Checkpoint,
    base: BaseModel,
    quantizer: Nf4,
    rows: Sequence[Sequence[int]],
    rank: int,
    progress: Progress,
    course: Course | None = None,
) -> Recovery:
    """Write the LoRA checkpoint into the empty `directory`, in PEFT's layout, with a stamp that says what it is.

    `rows`: token ids of the user's texts, 10 different ones or more. One model is in memory at a time, in float32;
    on the GPU where there is one. Raises BaseMismatch for a base that isn't full precision, TextUnreadable for too
    few rows, RouteRefused for a rank or a number of steps that can't be.
    """
    course = course or Course(steps=100)
    _require_possible(base, course)
    found = targets(checkpoint, base, quantizer, base, rank)
    parts = split(rows, course.steps * course.rows_per_step)
    taught = _teach(checkpoint, base, quantizer, parts, progress)
    start: Halves = {}
    for done, correction in enumerate(
        corrected(checkpoint, base, quantizer, base, rank, found, taught.inputs), start=1
    ):
        start[correction.target.module] = (correction.fit.a, correction.fit.b)
        progress("fitting the quantization error", done, len(found))
    taught = replace(taught, inputs={})
    recovery, best = _study(base, found, start, _naive(checkpoint, found, rank), parts, taught, course, progress)
    _write(directory, checkpoint, base, found, best, rank, progress)
    return recovery


def verdict(recovery: Recovery) -> str:
    """Whether it was worth it, in a sentence."""
    if recovery.kl_recovered >= recovery.kl_naive:
        return (
            f"Nothing was gained: the adapter as it is on the full-precision weights has a KL of "
            f"{recovery.kl_naive:.4f} on held-out rows, and neither the fit ({recovery.kl_start:.4f}) nor distilling "
            "came below it; it is written as it is."
        )
    return (
        f"Beats the naive merge: KL {recovery.kl_recovered:.4f} on held-out rows after {recovery.steps} steps at rank "
        f"{recovery.rank}, against {recovery.kl_naive:.4f} of the adapter as it is on the full-precision weights and "
        f"{recovery.kl_start:.4f} of the fit that distilling began with."
    )


def split(rows: Sequence[Sequence[int]], most_trained: int) -> Rows:
    """Every fifth different row is held out and the one two before it watched. Raises TextUnreadable for too few."""
    import torch

    different = list(dict.fromkeys(tuple(row[:_MAX_ROW_TOKENS]) for row in rows if len(row) > 1))
    if len(different) < _MIN_ROWS:
        raise TextUnreadable(
            f"Recovering needs at least {_MIN_ROWS} different rows of two tokens or more, there are {len(different)}: "
            "some are trained on, others are kept to measure on. Give more text like that of the fine-tune."
        )
    tensors = [torch.tensor([row]) for row in different]
    trained = [row for index, row in enumerate(tensors) if index % 5 not in (2, 4)]
    return Rows(tuple(trained[:most_trained]), _bounded(tensors[2::5]), _bounded(tensors[4::5]))


def _bounded(rows: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    kept, left = [], _MAX_HELD_TOKENS
    for row in rows:
        if min(left, row.shape[1]) > 1:
            kept.append(row[:, :left])
            left -= row.shape[1]
    return tuple(kept)


def _require_possible(base: BaseModel, course: Course) -> None:
    if base.is_quantized:
        raise BaseMismatch(
            f"Recovering ends on the full-precision weights; {base.root} holds only their 4-bit form. "
            "Give the original model directory with --base."
        )
    if not 0 <= course.steps <= MAX_STEPS:
        raise RouteRefused(f"{course.steps} steps: recovering takes at most {MAX_STEPS}; beyond that, train on.")


def _teach(checkpoint: Checkpoint, base: BaseModel, quantizer: Nf4, parts: Rows, progress: Progress) -> _Taught:
    """One pass of the function as trained over all rows, recording what its layers read on those trained on."""
    device = _device()
    model = with_adapter(load(base, quantizer), checkpoint).to(device)
    modules = [module for module in base.linears if not (base.linears[module].is_head and base.is_tied)]
    lessons: list[Lesson] = []
    total = sum(map(len, (parts.trained, parts.watched, parts.held)))
    with InputRecorder(model.get_base_model(), modules) as recorder:
        for row in parts.trained:
            progress("asking the teacher", len(lessons), total)
            lessons.append(Lesson.of(row, log_probs(model, row.to(device))))
    watched = tuple(Lesson.of(row, log_probs(model, row.to(device))) for row in parts.watched)
    held = tuple(log_probs(model, row.to(device)).cpu() for row in parts.held)
    progress("asking the teacher", total, total)
    return _Taught(tuple(lessons), watched, held, recorder.inputs())


def _naive(checkpoint: Checkpoint, found: Sequence[Target], rank: int) -> Halves:
    """The adapter's own deltas at the larger rank; zero where it has none."""
    import torch

    halves: Halves = {}
    for target in found:
        if target.pair is None:
            halves[target.module] = (torch.zeros(rank, target.in_features), torch.zeros(target.out_features, rank))
            continue
        a, b = checkpoint.read(target.pair)
        halves[target.module] = lora.padded(a.float(), b.float() * target.pair.scaling, rank)
    return halves


def _study(
    base: BaseModel,
    found: Sequence[Target],
    start: Halves,
    naive: Halves,
    parts: Rows,
    taught: _Taught,
    course: Course,
    progress: Progress,
) -> tuple[Recovery, Halves | None]:
    """Measure, distil, measure; the best halves, or None where the adapter as it is was best."""
    gc.collect()
    modules = [target.module for target in found]
    rank = len(next(iter(start.values()))[0])
    model = lora_model(load(base, None), modules, rank).to(_device()).eval()
    kls = []
    for halves in (naive, start):
        set_halves(model, halves)
        kls.append(_divergence(model, parts.held, taught.held))
    kl_naive, kl_start = kls
    distilled = distill(model, modules, taught.lessons, taught.watched, course, progress)
    best, steps, kl = distilled.halves, distilled.steps, _divergence(model, parts.held, taught.held)
    if kl >= kl_start:
        best, steps, kl = start, 0, kl_start
    recovery = Recovery(rank=rank, steps=steps, kl_naive=kl_naive, kl_start=kl_start, kl_recovered=min(kl, kl_naive))
    return recovery, best if kl < kl_naive else None


def _divergence(model: Any, rows: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Mean KL in nats a position, of full distributions, in float64."""
    import torch

    found = []
    for row, want in zip(rows, expected, strict=True):
        want64, got64 = want.double(), log_probs(model, row.to(_device())).cpu().double()
        found.append((want64.exp() * (want64 - got64)).sum(-1).clamp_min(0))
    return float(torch.cat(found).mean())


def _write(
    directory: Path,
    checkpoint: Checkpoint,
    base: BaseModel,
    found: Sequence[Target],
    best: Halves | None,
    rank: int,
    progress: Progress,
) -> None:
    source = base.source(checkpoint.base_name)
    if best is None:
        write_adapter(directory, checkpoint, source, progress)
    else:
        specs = [target.specs(rank) for target in found]
        with ShardWriter(directory, Shard(f"{ADAPTER_STEM}.safetensors", sum(specs, ()))) as file:
            for target, (a, b) in zip(found, specs, strict=True):
                for spec, half in zip((a, b), best[target.module], strict=True):
                    file.write(spec.name, half)
        write_json(directory / ADAPTER_CONFIG, adapter_config(found, rank, source))
    write_json(directory / STAMP, stamp(Training.LORA))
    carried = checkpoint.tokenizer_files + checkpoint.chat_template_files
    for path in carried or base.tokenizer_files + base.chat_template_files:
        copy_file(path, directory)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
