"""Builds one candidate: everything of an artifact except its golden answers and its manifest."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from convert.artifact import ADAPTER_DIR, CHECKPOINT_DIR, MODEL_DIR, Recovery
from convert.artifact.durable_files import replace_file
from convert.artifact.file_names import CONFIG
from convert.inputs.adapter_checkpoint import Checkpoint
from convert.inputs.base_model import BaseModel
from convert.inputs.model_config import read_config, with_dtype
from convert.pipeline.request import Candidate, PreparedRequest
from convert.plan.conversion_plan import ModelPlan, OutputFormat, float32_copy, plan_model
from convert.plan.side_files import json_content
from convert.progress import Progress
from convert.quality import Tokenizer, token_rows
from convert.quantization.llmcompressor import quantize_calibrated
from convert.routes.distillation import TrainingSchedule
from convert.routes.rebase import activations_as_trained, rebase
from convert.routes.recover import recover
from convert.routes.trained_adapter import TrainedAdapter
from convert.safetensors_io.tensors import DTYPES
from convert.write.adapter import write_adapter
from convert.write.files import write_side_files
from convert.write.journal import Journal
from convert.write.model import write_model

_UNQUANTIZED_DIR = ".unquantized"


@dataclass(frozen=True)
class BuildResult:
    """The facts for the manifest that are known only after the build."""

    base_digests: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of the base's weight files by name; empty where they were not read whole."""
    quantizer: str | None = None
    """The calibrated quantizer, in words; None where weights were rounded to nearest or not quantized."""
    recovery: Recovery | None = None


@dataclass(frozen=True)
class Builder:
    """Writes candidates of one request below `root`. Files that the journal holds are kept as they are."""

    prepared: PreparedRequest
    root: Path
    journal: Journal | None
    progress: Progress

    def build(self, candidate: Candidate) -> BuildResult:
        """Write the model and the adapter of the candidate. Raises ConvertError."""
        checkpoint = self.prepared.checkpoint
        if candidate.rank:
            self.progress(f"computing an adapter of rank {candidate.rank}", 0, 1)
        match candidate.variant.route:
            case "adapter":
                result = self._write_model(candidate.plan, checkpoint)
                write_adapter(self._directory(ADAPTER_DIR), checkpoint, self.prepared.base_source, self.progress)
                return result
            case "rebase":
                result = self._write_model(candidate.plan, checkpoint)
                self._rebase(candidate)
                return result
            case "recover":
                return self._recover(candidate)
            case "merge":
                return self._write_model(candidate.plan, checkpoint)

    def _write_model(self, plan: ModelPlan | None, checkpoint: Checkpoint) -> BuildResult:
        if plan is None:
            return BuildResult()
        request = self.prepared.request
        if request.method != "rtn" and plan.output_format.quantization_format:
            return self._write_calibrated(plan, checkpoint)
        model = self._directory(MODEL_DIR)
        return BuildResult(
            write_model(model, plan, self.prepared.base, checkpoint, self.progress, self.journal, request.shard_bytes)
        )

    def _write_calibrated(self, plan: ModelPlan, checkpoint: Checkpoint) -> BuildResult:
        """Quantize a float32 copy of the model by llm-compressor with the calibration text; the copy is removed."""
        base, method, stored = self.prepared.base, self.prepared.request.method, plan.output_format.quantization_format
        assert stored, "checked by _write_model"
        assert stored.name in ("w4a16", "w8a8-int8"), "checked with the request"
        assert method != "rtn", "checked by _write_model"
        scratch = self._directory(_UNQUANTIZED_DIR)
        unquantized = float32_copy(plan, base, checkpoint)
        write_model(scratch, unquantized, base, checkpoint, self.progress)
        model = self._directory(MODEL_DIR)
        rows = self._calibration_rows(Tokenizer.open(scratch))
        quantizer = quantize_calibrated(scratch, model, method, stored.name, rows, self.progress, dtype=base.dtype)
        shutil.rmtree(scratch)
        config = read_config(model)  # as the quantizer's transformers writes it, with one name of the type
        replace_file(model / CONFIG, json_content(with_dtype(config, DTYPES[base.dtype][1])))
        write_side_files(model, plan.stop_tokens.files)
        return BuildResult(quantizer=quantizer)

    def _rebase(self, candidate: Candidate) -> None:
        prepared = self.prepared
        trained = TrainedAdapter(prepared.checkpoint, prepared.base, candidate.choice.quantizer)
        onto = BaseModel.open(self.root / MODEL_DIR) if candidate.plan else prepared.base
        activations = None
        if prepared.calibration:
            import torch

            rows = [torch.tensor([row]) for row in self._calibration_rows(Tokenizer.open(onto.root))]
            activations = activations_as_trained(trained, rows, self.progress)
        rebase(self._directory(ADAPTER_DIR), trained, onto, prepared.rank, self.progress, activations)

    def _recover(self, candidate: Candidate) -> BuildResult:
        prepared = self.prepared
        quantizer, output_format = candidate.choice.quantizer, candidate.choice.output_format
        assert quantizer, "only a QLoRA is recovered"
        assert output_format, "a recovered adapter is merged"
        directory = self._directory(CHECKPOINT_DIR)
        recovery = recover(
            directory,
            TrainedAdapter(prepared.checkpoint, prepared.base, quantizer),
            self._calibration_rows(prepared.tokenizer),
            prepared.rank,
            TrainingSchedule(steps=prepared.request.steps),
            self.progress,
        )
        recovered = Checkpoint.open(directory)
        plan = plan_model(prepared.base, OutputFormat("original", output_format.quantization_format), recovered)
        return replace(self._write_model(plan, recovered), recovery=recovery)

    def _calibration_rows(self, tokenizer: Tokenizer) -> Sequence[list[int]]:
        assert self.prepared.calibration, "checked with the request"
        return token_rows(self.prepared.calibration, tokenizer)

    def _directory(self, name: str) -> Path:
        path = self.root / name
        path.mkdir(exist_ok=True)
        return path
