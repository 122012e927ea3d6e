"""The plan of a conversion: every tensor that will be written, known and checked before the first byte.

A model is written step by step, with one tensor of the base in memory at a time:

    CopyStep      the stored bytes are copied
    CastStep      the tensor is cast to the 16-bit type of the output
    LinearStep    a linear layer's weight: read as the adapter was trained on it, updated, stored in the output's format
    UpdateStep    any other weight that the checkpoint changes: read, updated, rounded once
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from convert.errors import BaseMismatch, BaseUnreadable
from convert.inputs.adapter_checkpoint import Checkpoint
from convert.inputs.base_model import BaseModel, Linear
from convert.inputs.model_config import rope_note, with_dtype, with_language_settings, with_own_head
from convert.plan.side_files import SideFiles, side_files
from convert.plan.stop_tokens import StopTokens
from convert.plan.weight_updates import WeightUpdate, WeightUpdates
from convert.quantization.format import QuantizationFormat
from convert.quantization.nf4 import Nf4
from convert.safetensors_io.tensors import DTYPES, FLOATS, TensorSpec

MergedOnto = Literal["original", "dequantized"]


@dataclass(frozen=True)
class OutputFormat:
    """How the written model is made: which weights the delta is added to, and how its linear layers are stored.

    `merged_onto`: None where no delta is merged. `quantization_format`: None where linear layers are stored as floats.
    `quantizer`: of training; a full-precision base is quantized and dequantized by it before the delta is added.
    `dtype`: the 16-bit type of everything that is not quantized; None for the base's own.
    """

    merged_onto: MergedOnto | None
    quantization_format: QuantizationFormat | None
    quantizer: Nf4 | None = None
    dtype: str | None = None


@dataclass(frozen=True)
class CopyStep:
    spec: TensorSpec

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return (self.spec,)


@dataclass(frozen=True)
class CastStep:
    """`spec`: the tensor as it is written."""

    spec: TensorSpec

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return (self.spec,)


@dataclass(frozen=True)
class LinearStep:
    linear: Linear
    update: WeightUpdate
    quantization_format: QuantizationFormat | None
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class UpdateStep:
    """`source`: the weight in the base, which for the new head of a tied model is the embedding."""

    source: TensorSpec
    update: WeightUpdate
    spec: TensorSpec

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return (self.spec,)


Step = CopyStep | CastStep | LinearStep | UpdateStep


@dataclass(frozen=True)
class ModelPlan:
    """A model directory to be written. `files`, `config`: before the stop tokens are in them."""

    output_format: OutputFormat
    steps: tuple[Step, ...]
    files: SideFiles
    config: Mapping[str, Any]
    update_notes: tuple[str, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """What is corrected or added besides the weights, in sentences. Loads the tokenizer."""
        return self.update_notes + self.stop_tokens.notes

    @cached_property
    def stop_tokens(self) -> StopTokens:
        """The files and config.json as they are written. Loads the tokenizer. Raises BaseUnreadable."""
        return StopTokens.of(self.files, self.config)

    @property
    def weight_bytes(self) -> int:
        return sum(spec.nbytes for step in self.steps for spec in step.outputs)


def plan_model(
    base: BaseModel, output_format: OutputFormat, checkpoint: Checkpoint, updates: WeightUpdates | None = None
) -> ModelPlan:
    """Every tensor and file of the model directory.

    Raises BaseUnreadable when no tokenizer is anywhere, or a vision tower is quantized that can't stay as it is, and
    BaseMismatch for an update of a weight that is not written.
    """
    if updates is None:
        updates = WeightUpdates.of(checkpoint, base, separate=output_format.merged_onto is None)
    steps = sorted(_Planner(base, output_format).steps(updates), key=lambda step: step.outputs[0].name)
    changed = {_changed_weight(step) for step in steps}
    if left := sorted(updates.by_weight.keys() - changed):
        raise BaseMismatch(f"{base.root} has no weight of its own for what was trained of {', '.join(left[:3])}.")
    config = _output_config(base, output_format, updates)
    notes = tuple(_update_notes(base, updates))
    return ModelPlan(output_format, tuple(steps), side_files(checkpoint, base), config, notes)


def _changed_weight(step: Step) -> str | None:
    """The name of the base's weight that a step may update."""
    match step:
        case LinearStep(linear):
            return linear.weight
        case UpdateStep():
            return step.spec.name
        case _:
            return None


def _output_config(base: BaseModel, output_format: OutputFormat, updates: WeightUpdates) -> dict[str, Any]:
    """config.json of the written model."""
    # _name_or_path is a path on the disk of whoever saved the base.
    config = {name: value for name, value in base.config.items() if name != "_name_or_path"}
    config = _updated_config(config, base, updates)
    planner = _Planner(base, output_format)
    if planner.keeps_base:
        stated = config.get("dtype") or config.get("torch_dtype")
        return with_dtype(config, stated or DTYPES[base.embedding.dtype][1])
    config.pop("quantization_config", None)
    if output_format.quantization_format:
        float_parts = base.architecture.other_parts
        config["quantization_config"] = output_format.quantization_format.config(float_parts)
    return with_dtype(config, DTYPES[planner.dtype][1])


def float32_copy(plan: ModelPlan, base: BaseModel, checkpoint: Checkpoint) -> ModelPlan:
    """The plan of the same model in float32, which calibrated quantizers read."""
    return plan_model(base, replace(plan.output_format, quantization_format=None, dtype="F32"), checkpoint)


@dataclass(frozen=True)
class _Planner:
    """Plans the steps of a model that is written from a base in an output format."""

    base: BaseModel
    output_format: OutputFormat

    @property
    def keeps_base(self) -> bool:
        """Whether the base's tensors are copied as they are, except those that an update changes."""
        output_format = self.output_format
        return output_format.merged_onto is None and output_format.quantization_format == self.base.quantization_format

    @property
    def dtype(self) -> str:
        """The type of the written floats."""
        return self.output_format.dtype or self.base.dtype

    def steps(self, updates: WeightUpdates) -> Iterator[Step]:
        for spec in self.base.other_part_specs:
            yield self._other_part_step(spec)
        for spec in self.base.language_specs:
            yield self._float_step(spec, updates.by_weight.get(spec.name))
        for linear in self.base.linears.values():
            # Some tied models store the head a second time; the embedding is what counts.
            if not (linear.is_head and self.base.is_tied and updates.changes_embedding):
                yield from self._linear_steps(linear, updates.by_weight.get(linear.weight))
        if updates.untie_head:
            head = self.base.architecture.head_weight
            yield self._update_step(self.base.embedding, updates.by_weight[head], head)

    def _other_part_step(self, spec: TensorSpec) -> CopyStep:
        """Raises BaseUnreadable for a quantized weight where config.json will name another quantization."""
        if spec.dtype not in FLOATS and not self.keeps_base:
            raise BaseUnreadable(
                f"{self.base.root}: {spec.name!r} is {spec.dtype}. Only the language model is converted, and what else "
                "there is must be stored as floats. Give the original model, or keep this base: --route adapter "
                f"--quantize {self.base.quantization_name}."
            )
        return CopyStep(spec)

    def _linear_steps(self, linear: Linear, update: WeightUpdate | None) -> Sequence[Step]:
        specs = self.base.stored_specs(linear)
        if update is None and self.keeps_base:
            return [CopyStep(spec) for spec in specs]
        stays_float = linear.quantization_format is None and (linear.is_head or not self._changes_linears)
        if stays_float and (linear.is_head or update is None):
            return [self._float_step(specs[0], update)]
        return [self._linear_step(linear, update or WeightUpdate())]

    def _linear_step(self, linear: Linear, update: WeightUpdate) -> LinearStep:
        quantization_format = None if linear.is_head else self.output_format.quantization_format
        if quantization_format:
            outputs = quantization_format.specs(linear.module, linear.shape)
        else:
            outputs = (TensorSpec(linear.weight, self.dtype, linear.shape),)
        return LinearStep(linear, update, quantization_format, outputs)

    @property
    def _changes_linears(self) -> bool:
        """Whether linear layers without an update change too: they are quantized, or dequantized NF4 is written."""
        return self.output_format.quantization_format is not None or self.output_format.merged_onto == "dequantized"

    def _float_step(self, spec: TensorSpec, update: WeightUpdate | None) -> Step:
        if update:
            return self._update_step(spec, update, spec.name)
        dtype = self._written_dtype(spec)
        return CopyStep(spec) if spec.dtype == dtype else CastStep(TensorSpec(spec.name, dtype, spec.shape))

    def _update_step(self, source: TensorSpec, update: WeightUpdate, name: str) -> UpdateStep:
        shape = update.saved.shape if update.saved else source.shape
        return UpdateStep(source, update, TensorSpec(name, self._written_dtype(source), shape))

    def _written_dtype(self, spec: TensorSpec) -> str:
        """The type of a tensor that is no quantized weight. It changes only where the whole model's type changes.

        A float32 model is written in 16 bits; a single float32 tensor in a 16-bit model is float32 on purpose.
        """
        if self.keeps_base or spec.dtype != self.base.embedding.dtype:
            return spec.dtype
        return self.dtype


def _updated_config(config: dict[str, Any], base: BaseModel, updates: WeightUpdates) -> dict[str, Any]:
    config = with_own_head(config) if updates.untie_head else config
    if updates.vocabulary != base.vocabulary:
        config = with_language_settings(config, {"vocab_size": updates.vocabulary})
    return config


def _update_notes(base: BaseModel, updates: WeightUpdates) -> Iterator[str]:
    if updates.untie_head:
        yield (
            "Embedding and head shared one weight in the base, and differ after training: "
            f"{base.architecture.head_weight} is written, and tie_word_embeddings is false."
        )
    if updates.vocabulary != base.vocabulary:
        yield f"The vocabulary was resized in training: from {base.vocabulary} to {updates.vocabulary} rows."
    if note := rope_note(base.language_settings):
        yield note
