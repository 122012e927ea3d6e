"""Estimates every phase of a candidate: building it, and measuring it against the function as trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from convert.pipeline.request import Candidate, PreparedRequest
from convert.plan.conversion_plan import float32_copy
from convert.plan.estimate import adapter_phase, beside, writing_phase
from convert.plan.phases import LIBRARY_BYTES, Estimate, Phase, Work
from convert.plan.rates import measure_rates
from convert.quality import ANSWER_TOKENS, MeasuredModels, prompts_of, token_rows, tokenize
from convert.routes.distillation import TrainingSchedule
from convert.routes.recover import MAX_ROW_TOKENS

# The process of the calibrated quantizer: Python with torch, transformers and llm-compressor.
_QUANTIZER_LIBRARY_BYTES = 480 << 20
# What AWQ tries for each layer; GPTQ runs each layer once to record its inputs, and once quantized.
_AWQ_PASSES, _GPTQ_PASSES = 22, 2
# Fitting holds two weights, their difference and what is multiplied with it, in float32.
_OF_FIT = 5 * 4
_FIT_PRODUCTS = 2 * 2 * 7  # two products with the difference and its transpose in each of seven iterations
# Bytes for each number of a layer's width that training keeps for the way back, at each position, beside the MLP's.
_KEPT_WIDTHS = 14


@dataclass(frozen=True)
class Estimator:
    """Estimates the candidates of one request. `models`: None where nothing is measured."""

    prepared: PreparedRequest
    models: MeasuredModels | None

    @classmethod
    def of(cls, prepared: PreparedRequest) -> Estimator:
        """Tokenizes the text. Raises TextUnreadable where no row is left."""
        if not prepared.request.measure:
            return cls(prepared, None)
        tokens = sum(row.shape[1] for row in tokenize(prepared.text, prepared.tokenizer).all)
        canaries = prompts_of(prepared.canaries, prepared.tokenizer)
        models = MeasuredModels(prepared.base, prepared.checkpoint, prepared.quantizer, tokens, canaries, ANSWER_TOKENS)
        return cls(prepared, models)

    def estimate(self, candidate: Candidate) -> Estimate:
        """The phases, without seconds."""
        output = (candidate.plan.weight_bytes if candidate.plan else 0) + self._adapter_bytes(candidate)
        return Estimate(output, (*self._building(candidate), *self._measuring(candidate, output)))

    def timed(self, candidate: Candidate) -> Estimate:
        """The phases with seconds, by the speed of this machine, which is measured."""
        prepared, estimate = self.prepared, self.estimate(candidate)
        rates = measure_rates(candidate.plan, prepared.base, prepared.checkpoint, candidate.choice.quantizer)
        return replace(estimate, seconds=tuple(rates.seconds(phase.work) for phase in estimate.phases))

    def _adapter_bytes(self, candidate: Candidate) -> int:
        """Of the adapter that is written beside a model."""
        match candidate.variant.route:
            case "adapter":
                return self.prepared.checkpoint.weight_bytes
            case "rebase" | "recover":
                return self._corrected_bytes(candidate)
            case "merge":
                return 0

    def _is_calibrated(self, candidate: Candidate) -> bool:
        plan = candidate.plan
        return self.prepared.request.method != "rtn" and bool(plan and plan.output_format.quantization_format)

    def _building(self, candidate: Candidate) -> tuple[Phase, ...]:
        prepared, plan = self.prepared, candidate.plan
        writing: tuple[Phase, ...] = ()
        if plan:
            is_calibrated = self._is_calibrated(candidate)
            writing = self._calibrated(candidate) if is_calibrated else (writing_phase(plan, prepared.base),)
        model_bytes = plan.weight_bytes if plan else 0
        match candidate.variant.route:
            case "adapter":
                return (*writing, adapter_phase(prepared.checkpoint, model_bytes))
            case "rebase":
                return (*writing, *self._rebase(candidate, model_bytes))
            case "recover":
                recovering = self._recover(candidate)
                return (recovering, *(beside(phase, recovering.disk_bytes) for phase in writing))
            case "merge":
                return writing

    def _calibrated(self, candidate: Candidate) -> tuple[Phase, ...]:
        """A float32 copy of the whole model is written, read by the quantizer's process, and removed at the end."""
        prepared, plan = self.prepared, candidate.plan
        assert plan, "a calibrated model is written"
        copy = float32_copy(plan, prepared.base, prepared.checkpoint)
        remedy = "Free some, raise the limit, or take --method rtn."
        writing = replace(writing_phase(copy, prepared.base), name="Writing the float32 copy", remedy=remedy)
        shapes = [linear.shape for linear in prepared.base.layer_linears]
        tokens, weights = sum(map(len, self._calibration_rows)), sum(map(math.prod, shapes))
        width = prepared.base.embedding.shape[1]
        hessians = 4 * max(columns for _, columns in shapes) ** 2
        passes = _AWQ_PASSES if prepared.request.method == "awq" else _GPTQ_PASSES
        own = sum(tokens * columns**2 + rows * columns**2 + columns**3 for rows, columns in shapes)
        calibrating = Phase(
            "Calibrating the quantizer",
            # The process of the quantizer keeps the float32 weights that it frees while it casts them to 16 bits.
            LIBRARY_BYTES
            + _QUANTIZER_LIBRARY_BYTES
            + copy.weight_bytes * 3 // 2
            + 3 * hessians
            + 2 * 4 * tokens * width,
            Work(
                products=passes * tokens * weights + (0 if prepared.request.method == "awq" else own),
                read_bytes=copy.weight_bytes,
                written_bytes=plan.weight_bytes,
            ),
            disk_bytes=copy.weight_bytes + plan.weight_bytes,
            remedy=remedy,
        )
        return writing, calibrating

    def _rebase(self, candidate: Candidate, model_bytes: int) -> tuple[Phase, ...]:
        prepared = self.prepared
        shapes = [linear.shape for linear in prepared.base.layer_linears]
        fitting = Phase(
            "Fitting the difference",
            LIBRARY_BYTES + _OF_FIT * max(map(math.prod, shapes)),
            self._fit_work(candidate),
            model_bytes + self._corrected_bytes(candidate),
            remedy="Free some, or raise the limit.",
        )
        if not prepared.calibration:
            return (fitting,)
        tokens = sum(map(len, self._calibration_rows))
        recorded = self._activation_bytes(tokens)
        recording = Phase(
            "Recording the layers' inputs",
            LIBRARY_BYTES + self._model_bytes + recorded + prepared.checkpoint.weight_bytes,
            Work(products=tokens * sum(map(math.prod, shapes)), read_as_trained=sum(map(math.prod, shapes))),
            model_bytes,
            remedy="Free some, raise the limit, or leave out --calibration.",
        )
        return recording, replace(fitting, memory_bytes=fitting.memory_bytes + recorded)

    def _recover(self, candidate: Candidate) -> Phase:
        """The teacher and the student are in memory one after the other, the student with what training keeps."""
        prepared, base = self.prepared, self.prepared.base
        shapes, nbytes = [linear.shape for linear in base.layer_linears], self._corrected_bytes(candidate)
        schedule = TrainingSchedule(prepared.request.steps)
        rows = [min(len(row), MAX_ROW_TOKENS) for row in self._calibration_rows]
        batch = schedule.rows_per_step * max(rows, default=0)
        kept = sum(2 * rows_out + columns for rows_out, columns in shapes) + _KEPT_WIDTHS * base.embedding.shape[1]
        training = 4 * batch * kept + 3 * 4 * batch * base.vocabulary
        teacher = 4 * min(sum(rows) // 5, 1024) * base.vocabulary
        tokens = sum(rows) + 3 * schedule.steps * batch
        return Phase(
            "Recovering",
            LIBRARY_BYTES + self._model_bytes + 5 * nbytes + training + teacher,
            replace(self._fit_work(candidate), products=tokens * sum(map(math.prod, shapes))),
            nbytes,
            remedy="Free some, raise the limit, or take --route merge.",
        )

    def _measuring(self, candidate: Candidate, output: int) -> tuple[Phase, ...]:
        models, choice = self.models, candidate.choice
        if models is None or not choice.is_measurable:
            return ()
        temporary = models.temporary_bytes()
        remedy = "Free some, raise the limit, or leave it out with --no-measure."
        stored = choice.output_format.quantization_format if choice.output_format else None
        if candidate.plan is None:
            stored = self.prepared.base.quantization_format
        adapter = 0
        if candidate.variant.route == "adapter":
            adapter = sum(4 * math.prod(spec.shape) for spec in self.prepared.checkpoint.adapter_state.specs)
        elif candidate.variant.route == "rebase":
            adapter = self._corrected_bytes(candidate)
        measured = [
            Phase("Measuring the reference", models.reference_bytes(), models.reference_work()),
            Phase("Measuring the result", models.result_bytes(stored, adapter), models.result_work()),
        ]
        if candidate.variant.route == "merge":
            measured.append(Phase("Measuring retention", models.retention_bytes()))
        return tuple(replace(phase, disk_bytes=output, temporary_bytes=temporary, remedy=remedy) for phase in measured)

    def _corrected_bytes(self, candidate: Candidate) -> int:
        """Of a corrected adapter, which every linear layer may have."""
        return sum(4 * (candidate.rank or 0) * sum(linear.shape) for linear in self.prepared.base.layer_linears)

    def _fit_work(self, candidate: Candidate) -> Work:
        weights = sum(math.prod(linear.shape) for linear in self.prepared.base.layer_linears)
        products = _FIT_PRODUCTS * (candidate.rank or 0) * weights
        return Work(read_as_trained=weights, read_stored=weights, products=products)

    @property
    def _model_bytes(self) -> int:
        """The whole model in float32."""
        base = self.prepared.base
        matrices = 1 if base.is_tied else 2
        layers = sum(math.prod(linear.shape) for linear in base.layer_linears)
        return 4 * (layers + matrices * math.prod(base.embedding.shape))

    def _activation_bytes(self, tokens: int) -> int:
        """Of queries, keys and values, and of the two first matrices of the MLP, the inputs are recorded once."""
        inputs = {
            (self.prepared.base.architecture.layer_of(linear.module), linear.in_features, linear.module.split(".")[-2])
            for linear in self.prepared.base.layer_linears
        }
        return 2 * 2 * min(tokens, 2048) * sum(columns for _, columns, _ in inputs)

    @cached_property
    def _calibration_rows(self) -> Sequence[Sequence[int]]:
        assert self.prepared.calibration, "checked with the request"
        return token_rows(self.prepared.calibration, self.prepared.tokenizer)
