"""A candidate, made and measured against the function as trained."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from convert.artifact import ADAPTER_DIR, GOLDEN, MODEL_DIR, Quality, QuantizationName, Trial, size_bytes
from convert.journal import Journal
from convert.making import Made, make
from convert.preparation import Candidate, Job, stored_as
from convert.progress import Progress
from convert.quality import (
    Answer,
    Examination,
    Gate,
    Reference,
    Retained,
    examine,
    golden,
    reference,
    retention,
    write_golden,
)


@dataclass(frozen=True)
class Outcome:
    """What came out of one candidate. `quality` is None where it could not or should not be measured."""

    candidate: Candidate
    made: Made
    size_bytes: int
    examination: Examination | None = None
    retained: Retained | None = None
    failures: tuple[str, ...] = ()

    @property
    def quality(self) -> Quality | None:
        if self.examination is None:
            return None
        kept = self.retained.summary if self.retained else None
        return self.examination.quality.model_copy(update={"retention": kept})

    @property
    def quantization(self) -> QuantizationName:
        return stored_as(self.candidate.way, self.candidate.choice)

    def trial(self, verdict: str) -> Trial:
        """For the manifest."""
        return Trial(
            route=self.candidate.way.route,
            quantization=self.quantization,
            size_bytes=self.size_bytes,
            quality=self.quality,
            verdict=verdict,
        )


class Bench:
    """Tries candidates of one job, all against the same reference, which is computed once."""

    def __init__(self, job: Job, gate: Gate, progress: Progress) -> None:
        self._job, self._gate, self._progress = job, gate, progress
        self._reference: Reference | None = None

    def run(self, candidate: Candidate, root: Path, journal: Journal | None = None) -> Outcome:
        """Make the candidate below the empty `root` and measure it. Raises ConvertError."""
        made = make(self._job, candidate, root, journal, self._progress)
        outcome = Outcome(candidate, made, size_bytes(root))
        if not (self._job.request.measure and candidate.choice.measured):
            return outcome
        model = self._model(root)
        adapter = root / ADAPTER_DIR
        examination = examine(self.expected(model), model, adapter if adapter.is_dir() else None, self._progress)
        outcome = replace(outcome, examination=examination, retained=self._retained(candidate, model))
        quality = outcome.quality
        assert quality, "it was just measured"
        return replace(outcome, failures=self._gate.failures(quality))

    def expected(self, tokenizer: Path) -> Reference:
        """The function as trained, over the text; computed at the first call."""
        if self._reference is None:
            job = self._job
            self._reference = reference(
                job.checkpoint,
                job.base,
                job.quantizer,
                tokenizer,
                job.text,
                self._progress,
                job.canaries,
            )
        return self._reference

    @property
    def answers(self) -> tuple[Answer, ...]:
        """Of the function as trained, to the canaries."""
        return self._reference.answers if self._reference else ()

    def write_golden(self, outcome: Outcome, root: Path) -> str | None:
        """Write golden.json into `root`; its SHA-256, None where nothing was measured."""
        if outcome.examination is None:
            return None
        model = self._model(root)
        separate = (root / ADAPTER_DIR).is_dir()
        answers = golden(self.expected(model), outcome.examination, model, separate=separate)
        return write_golden(root / GOLDEN, answers)

    def _model(self, root: Path) -> Path:
        written = root / MODEL_DIR
        return written if written.is_dir() else self._job.base.root

    def _retained(self, candidate: Candidate, model: Path) -> Retained | None:
        """Of plain deltas added to a base that is known: a recovered adapter is another delta."""
        form = candidate.choice.form
        if candidate.way.route != "merge" or form is None or self._job.checkpoint.beside:
            return None
        return retention(self._job.checkpoint, self._job.base, form.quantizer, model, self._progress)
