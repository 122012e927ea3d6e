"""Builds candidates and measures them against the function as trained."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from convert.artifact import ADAPTER_DIR, GOLDEN, MODEL_DIR, Quality, QuantizationName, Trial, size_bytes
from convert.pipeline.build import Builder, BuildResult
from convert.pipeline.request import Candidate, PreparedRequest
from convert.progress import Progress
from convert.quality import (
    Answer,
    Examination,
    Gate,
    ModelRetention,
    Reference,
    collect_golden,
    compute_reference,
    examine,
    measure_retention,
    write_golden,
)
from convert.write.journal import Journal


@dataclass(frozen=True)
class Evaluation:
    """A candidate that was built and, where that is possible and wanted, measured.

    `failures`: a sentence for each limit that is not kept.
    """

    candidate: Candidate
    build: BuildResult
    size_bytes: int
    examination: Examination | None = None
    retained: ModelRetention | None = None
    failures: tuple[str, ...] = ()

    @property
    def quality(self) -> Quality | None:
        """The figures for the manifest; None where nothing was measured."""
        if self.examination is None:
            return None
        retention_summary = self.retained.summary if self.retained else None
        return self.examination.quality.model_copy(update={"retention": retention_summary})

    @property
    def quantization(self) -> QuantizationName:
        return self.candidate.quantization

    def trial(self) -> Trial:
        """The entry of the manifest for a candidate that did not keep its limits."""
        return Trial(
            route=self.candidate.variant.route,
            quantization=self.quantization,
            size_bytes=self.size_bytes,
            quality=self.quality,
            verdict=" ".join(self.failures),
        )


class Evaluator:
    """Evaluates the candidates of one request against one reference, which is computed once."""

    def __init__(self, prepared: PreparedRequest, gate: Gate, progress: Progress) -> None:
        self._prepared, self._gate, self._progress = prepared, gate, progress
        self._reference: Reference | None = None

    def evaluate(self, candidate: Candidate, root: Path, journal: Journal | None = None) -> Evaluation:
        """Build the candidate below the empty `root`, and measure it. Raises ConvertError."""
        result = Builder(self._prepared, root, journal, self._progress).build(candidate)
        evaluation = Evaluation(candidate, result, size_bytes(root))
        if not (self._prepared.request.measure and candidate.choice.is_measurable):
            return evaluation
        model = self._model(root)
        adapter = root / ADAPTER_DIR
        expected = self.reference(model)
        examination = examine(expected, model, adapter if adapter.is_dir() else None, self._progress)
        evaluation = replace(evaluation, examination=examination, retained=self._retained(candidate, model))
        quality = evaluation.quality
        assert quality, "the candidate has been measured"
        gate = replace(self._gate, min_distance=None) if candidate.variant.is_exact else self._gate
        return replace(evaluation, failures=gate.failures(quality))

    def reference(self, tokenizer: Path) -> Reference:
        """The function as trained over the text, computed at the first call with the tokenizer of that directory."""
        if self._reference is None:
            prepared = self._prepared
            self._reference = compute_reference(
                prepared.checkpoint,
                prepared.base,
                prepared.quantizer,
                tokenizer,
                prepared.text,
                self._progress,
                prepared.canaries,
            )
        return self._reference

    @property
    def answers(self) -> tuple[Answer, ...]:
        """The answers of the function as trained to the canaries."""
        return self._reference.answers if self._reference else ()

    def write_golden(self, evaluation: Evaluation, root: Path) -> str | None:
        """Write golden.json into `root` and return its SHA-256; None where nothing was measured."""
        if evaluation.examination is None:
            return None
        model = self._model(root)
        separate = (root / ADAPTER_DIR).is_dir()
        answers = collect_golden(self.reference(model), evaluation.examination, model, separate=separate)
        return write_golden(root / GOLDEN, answers)

    def _model(self, root: Path) -> Path:
        written = root / MODEL_DIR
        return written if written.is_dir() else self._prepared.base.root

    def _retained(self, candidate: Candidate, model: Path) -> ModelRetention | None:
        """Retention is defined for a plain delta that was merged into known weights. `recover` merges another delta."""
        output_format = candidate.choice.output_format
        if (
            candidate.variant.route != "merge"
            or output_format is None
            or self._prepared.checkpoint.trained_besides_lora
        ):
            return None
        checkpoint, base = self._prepared.checkpoint, self._prepared.base
        return measure_retention(checkpoint, base, output_format.quantizer, model, self._progress)
