"""The plan of a conversion: every tensor that will be written, known and checked before the first byte.

A model is written step by step, one tensor of the base in memory at a time:

    Copied   bytes as they are
    Cast     brought to the 16-bit type of the output
    Made     a linear layer's weight: read, brought to what the adapter was trained on, edited, stored
    Edited   any other weight that the checkpoint changes: read, edited, rounded once
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from convert.base_model import BaseModel, Linear
from convert.checkpoint import Checkpoint
from convert.edits import HEAD_WEIGHT, Edit, Edits
from convert.errors import BaseUnreadable, CheckpointUnreadable, OutputUnwritable
from convert.formats import EMBEDDING, TOKENIZERS
from convert.nf4 import Nf4
from convert.scheme import Scheme
from convert.tensors import DTYPES, TensorSpec, read_json

MergedOnto = Literal["original", "dequantized"]

# Header and manifest of a few hundred modules, generously.
_SMALL_FILES_BYTES = 4 << 20


@dataclass(frozen=True)
class Form:
    """What the written model is: which weights the delta is added to, and how its linear layers are stored."""

    merged_onto: MergedOnto | None
    stored: Scheme | None
    # The quantizer of training: what a full-precision base is taken through before the delta is added.
    quantizer: Nf4 | None = None
    # The 16-bit type of everything that is not quantized; None: the base's own.
    dtype: str | None = None


@dataclass(frozen=True)
class Copied:
    spec: TensorSpec

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return (self.spec,)


@dataclass(frozen=True)
class Cast:
    spec: TensorSpec

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return (self.spec,)


@dataclass(frozen=True)
class Made:
    linear: Linear
    edit: Edit
    stored: Scheme | None
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class Edited:
    """`source` is the weight in the base: of an untied head, the embedding."""

    source: TensorSpec
    edit: Edit
    spec: TensorSpec

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return (self.spec,)


Step = Copied | Cast | Made | Edited


@dataclass(frozen=True)
class ModelPlan:
    """A model directory to be written. `settings`: keys of config.json that the edits change."""

    form: Form
    steps: tuple[Step, ...]
    files: tuple[Path, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def weight_bytes(self) -> int:
        return sum(spec.nbytes for step in self.steps for spec in step.outputs)


def plan_model(base: BaseModel, form: Form, checkpoint: Checkpoint, edits: Edits | None = None) -> ModelPlan:
    """Every tensor and file of the model directory. Raises BaseUnreadable when no tokenizer is anywhere."""
    if edits is None:
        edits = Edits.of(checkpoint, base, separate=form.merged_onto is None)
    steps = sorted(_steps(base, form, edits), key=lambda step: step.outputs[0].name)
    return ModelPlan(form, tuple(steps), _side_files(checkpoint, base), _changed_settings(base, edits))


def require_room(needed_bytes: int, destination: Path) -> None:
    """Raises OutputUnwritable when the destination's disk can't hold that much."""
    parent = next(path for path in destination.absolute().parents if path.exists())
    free, needed = shutil.disk_usage(parent).free, needed_bytes + _SMALL_FILES_BYTES
    if needed > free:
        raise OutputUnwritable(
            f"{parent} has {free / 1e9:.2f} GB free, the output needs {needed / 1e9:.2f} GB. "
            "Free some, or choose another --out."
        )


def differing_files(checkpoint: Checkpoint, base: BaseModel) -> tuple[str, ...]:
    """Tokenizer and template files of the checkpoint that the base has with other bytes, or hasn't."""
    theirs = {path.name: path for path in base.tokenizer_files + base.chat_template_files}
    ours = checkpoint.tokenizer_files + checkpoint.chat_template_files
    return tuple(
        path.name for path in ours if path.name not in theirs or theirs[path.name].read_bytes() != path.read_bytes()
    )


def _is_untouched(base: BaseModel, form: Form) -> bool:
    """Whether the base's weights are written as they are, where nothing edits them."""
    return form.merged_onto is None and form.stored == base.settings


def _steps(base: BaseModel, form: Form, edits: Edits) -> Iterator[Step]:
    for spec in base.others:
        edit = edits.of_weights.get(spec.name)
        yield _edited_step(base, spec, edit, form) if edit else _plain_step(base, spec, form)
    for module, linear in base.linears.items():
        # Some tied models store the head a second time; the embedding is what counts.
        if not (linear.is_head and base.is_tied and edits.touches_embedding):
            yield from _linear_steps(base, linear, form, edits.of_weights.get(f"{module}.weight"))
    if edits.untied:
        source, edit = base.tensors.specs[EMBEDDING], edits.of_weights[HEAD_WEIGHT]
        yield _edited_step(base, source, edit, form, HEAD_WEIGHT)


def _plain_step(base: BaseModel, spec: TensorSpec, form: Form) -> Step:
    """Embeddings, norms and biases stay as they are, except where the whole model changes its type: a float32 model
    is written in 16 bits. A single float32 tensor in a 16-bit model is there on purpose."""
    dtype = _plain_dtype(base, spec, form)
    return Copied(spec) if spec.dtype == dtype else Cast(TensorSpec(spec.name, dtype, spec.shape))


def _edited_step(base: BaseModel, source: TensorSpec, edit: Edit, form: Form, name: str | None = None) -> Step:
    shape = edit.saved.shape if edit.saved else source.shape
    return Edited(source, edit, TensorSpec(name or source.name, _plain_dtype(base, source, form), shape))


def _plain_dtype(base: BaseModel, spec: TensorSpec, form: Form) -> str:
    if _is_untouched(base, form) or spec.dtype != base.tensors.specs[EMBEDDING].dtype:
        return spec.dtype
    return _dtype(base, form)


def _dtype(base: BaseModel, form: Form) -> str:
    return form.dtype or base.dtype


def _linear_steps(base: BaseModel, linear: Linear, form: Form, edit: Edit | None) -> Iterator[Step]:
    if edit and linear.is_head and not linear.settings:
        yield _edited_step(base, base.tensors.specs[linear.weight], edit, form)
        return
    if not edit and _is_untouched(base, form):
        yield from map(Copied, base.stored(linear))
        return
    stored = None if linear.is_head else form.stored
    simulated = form.merged_onto == "dequantized" and not linear.is_head
    if not (edit or stored or simulated or linear.settings):
        yield _plain_step(base, base.tensors.specs[linear.weight], form)
        return
    if stored:
        outputs = stored.specs(linear.module, linear.shape)
    else:
        outputs = (TensorSpec(linear.weight, _dtype(base, form), linear.shape),)
    yield Made(linear, edit or Edit(), stored, outputs)


def model_config(base: BaseModel, plan: ModelPlan) -> dict[str, Any]:
    """config.json of the written model."""
    # _name_or_path is where somebody's disk had the model.
    config = {name: value for name, value in base.config.items() if name != "_name_or_path"}
    config.update(plan.settings)
    if _is_untouched(base, plan.form):
        return config
    config.pop("quantization_config", None)
    config.pop("torch_dtype", None)
    config["dtype"] = DTYPES[_dtype(base, plan.form)][1]
    if plan.form.stored:
        config["quantization_config"] = plan.form.stored.config()
    return config


def _changed_settings(base: BaseModel, edits: Edits) -> dict[str, Any]:
    changed: dict[str, Any] = {}
    if edits.untied:
        changed["tie_word_embeddings"] = False
    if edits.vocabulary != base.vocabulary:
        changed["vocab_size"] = edits.vocabulary
    return changed


def _side_files(checkpoint: Checkpoint, base: BaseModel) -> tuple[Path, ...]:
    """Tokenizer and chat template of the checkpoint when it carries a tokenizer, else of the base; never a mixture."""
    carried = any(path.name in TOKENIZERS for path in checkpoint.tokenizer_files)
    tokenizer = checkpoint.tokenizer_files if carried else base.tokenizer_files
    if not any(path.name in TOKENIZERS for path in tokenizer):
        raise BaseUnreadable(
            f"{base.root} has no tokenizer, and neither has {checkpoint.root}. Copy tokenizer.json and "
            "tokenizer_config.json of the base model into its directory."
        )
    templates = checkpoint.chat_template_files
    if not templates and not (carried and _has_template(tokenizer)):
        templates = base.chat_template_files
    return tokenizer + templates + base.generation_files


def _has_template(tokenizer: Sequence[Path]) -> bool:
    configs = [path for path in tokenizer if path.name == "tokenizer_config.json"]
    return any("chat_template" in read_json(path, CheckpointUnreadable) for path in configs)
