"""Making one candidate: everything of an artifact but its manifest."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from convert.artifact import ADAPTER_DIR, MODEL_DIR, Recovery
from convert.base_model import BaseModel
from convert.calibrated import quantize_calibrated
from convert.checkpoint import Checkpoint
from convert.distill import Course
from convert.journal import Journal
from convert.plan import Form, ModelPlan, plan_model
from convert.preparation import Candidate, Job
from convert.progress import Progress
from convert.quality import Tokenizer, token_rows
from convert.routes.adapter import write_adapter
from convert.routes.model import write_model
from convert.routes.rebase import inputs_as_trained, rebase
from convert.routes.recover import recover
from convert.writer import copy_file

# The recovered LoRA checkpoint: it can be trained on, and merged in other forms.
CHECKPOINT_DIR = "checkpoint"
_UNQUANTIZED = ".unquantized"


@dataclass(frozen=True)
class Made:
    """What is known only after making it."""

    base_files: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of the base's weight files by name; empty where they were not read whole."""
    quantizer: str | None = None
    recovery: Recovery | None = None


def make(job: Job, candidate: Candidate, root: Path, journal: Journal | None, progress: Progress) -> Made:
    """Write model/ and adapter/ of the candidate below `root`. Raises ConvertError.

    Files that the journal holds are kept as they are.
    """
    match candidate.way.route:
        case "adapter":
            made = _write(job, candidate.plan, job.checkpoint, root, journal, progress)
            write_adapter(_directory(root, ADAPTER_DIR), job.checkpoint, _source(job), progress)
            return made
        case "rebase":
            made = _write(job, candidate.plan, job.checkpoint, root, journal, progress)
            _rebase(job, candidate, root, progress)
            return made
        case "recover":
            return _recover(job, candidate, root, journal, progress)
        case "merge":
            return _write(job, candidate.plan, job.checkpoint, root, journal, progress)


def _write(
    job: Job, plan: ModelPlan | None, checkpoint: Checkpoint, root: Path, journal: Journal | None, progress: Progress
) -> Made:
    if plan is None:
        return Made()
    method, stored = job.request.method, plan.form.stored
    if method == "rtn" or stored is None:
        model = _directory(root, MODEL_DIR)
        shard_bytes = job.request.shard_bytes
        return Made(write_model(model, plan, job.base, checkpoint, progress, journal, shard_bytes))
    scratch = _directory(root, _UNQUANTIZED)
    unquantized = plan_model(job.base, replace(plan.form, stored=None, dtype="F32"), checkpoint)
    write_model(scratch, unquantized, job.base, checkpoint, progress)
    model = _directory(root, MODEL_DIR)
    rows = _calibration_rows(job, scratch)
    assert stored.name in ("w4a16", "w8a8-int8"), "checked with the request"
    quantizer = quantize_calibrated(scratch, model, method, stored.name, rows, progress, dtype=job.base.dtype)
    shutil.rmtree(scratch)
    for path in plan.files:
        if not (model / path.name).exists():
            copy_file(path, model)
    return Made(quantizer=quantizer)


def _rebase(job: Job, candidate: Candidate, root: Path, progress: Progress) -> None:
    onto = BaseModel.open(root / MODEL_DIR) if candidate.plan else job.base
    inputs = None
    if job.calibration:
        import torch

        rows = [torch.tensor([row]) for row in _calibration_rows(job, onto.root)]
        inputs = inputs_as_trained(job.checkpoint, job.base, candidate.choice.quantizer, rows, progress)
    directory = _directory(root, ADAPTER_DIR)
    rebase(
        directory, job.checkpoint, job.base, candidate.choice.quantizer, onto, job.rank, progress, inputs
    )  # fmt: skip


def _recover(job: Job, candidate: Candidate, root: Path, journal: Journal | None, progress: Progress) -> Made:
    quantizer, form = candidate.choice.quantizer, candidate.choice.form
    assert quantizer, "only a QLoRA is recovered"
    assert form, "it is merged"
    tokenizer = job.checkpoint.root if job.checkpoint.tokenizer_files else job.base.root
    directory = _directory(root, CHECKPOINT_DIR)
    recovery = recover(
        directory,
        job.checkpoint,
        job.base,
        quantizer,
        _calibration_rows(job, tokenizer),
        job.rank,
        progress,
        Course(steps=job.request.steps),
    )
    recovered = Checkpoint.open(directory)
    made = _write(
        job, plan_model(job.base, Form("original", form.stored), recovered), recovered, root, journal, progress
    )
    return replace(made, recovery=recovery)


def _calibration_rows(job: Job, tokenizer: Path) -> Sequence[list[int]]:
    assert job.calibration, "checked with the request"
    return token_rows(job.calibration, Tokenizer.open(tokenizer))


def _source(job: Job) -> str:
    return job.base.source(job.checkpoint.base_name)


def _directory(root: Path, name: str) -> Path:
    path = root / name
    path.mkdir(exist_ok=True)
    return path
