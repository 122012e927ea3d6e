"""Making one candidate: everything of an artifact but its manifest."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from convert.artifact import ADAPTER_DIR, MODEL_DIR, Recovery
from convert.base_model import BaseModel
from convert.calibrated import quantize_calibrated
from convert.checkpoint import Checkpoint
from convert.errors import BaseUnreadable
from convert.plan import plan_model
from convert.preparation import Candidate, Job
from convert.progress import Progress
from convert.quality import Text, token_rows
from convert.routes.adapter import write_adapter
from convert.routes.model import copy_side_files, write_model
from convert.routes.rebase import inputs_as_trained, rebase
from convert.routes.recover import Course, recover
from convert.writer import ArtifactWriter

# The recovered LoRA checkpoint: can be trained on, and merged in other forms.
CHECKPOINT_DIR = "checkpoint"
_UNQUANTIZED = "unquantized"


@dataclass(frozen=True)
class Made:
    """What is known only after making it. `base_files`: SHA-256 of the base's weight files, by name."""

    base_files: Mapping[str, str]
    quantizer: str | None = None
    recovery: Recovery | None = None


def make(job: Job, candidate: Candidate, writer: ArtifactWriter, progress: Progress) -> Made:
    """Write model/ and adapter/ of the candidate. Raises ConvertError."""
    match candidate.way.route:
        case "adapter":
            made = _model(job, candidate, job.checkpoint, writer, progress)
            source = job.base.source(job.checkpoint.base_name)
            write_adapter(writer.directory(ADAPTER_DIR), job.checkpoint, source, progress)
            return made
        case "rebase":
            made = _model(job, candidate, job.checkpoint, writer, progress)
            _rebase(job, candidate, writer, progress)
            return made
        case "recover":
            return _recover(job, candidate, writer, progress)
        case "merge":
            return _model(job, candidate, job.checkpoint, writer, progress)
