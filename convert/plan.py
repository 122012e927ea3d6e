"""The plan of a conversion: every tensor that will be written, known and checked before the first byte.

A model is written step by step, one tensor of the base in memory at a time:

    Copied   bytes as they are
    Cast     brought to the 16-bit type of the output
    Made     a linear layer's weight: read, brought to what the adapter was trained on, the delta added, stored
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from convert.base_model import BaseModel, Linear
from convert.checkpoint import Checkpoint, LoraPair
from convert.errors import BaseMismatch, BaseUnreadable, CheckpointUnreadable, OutputUnwritable
from convert.formats import EMBEDDING, HEAD, LAYER_LINEAR, TOKENIZERS
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
    pair: LoraPair | None
    stored: Scheme | None
    outputs: tuple[TensorSpec, ...]


Step = Copied | Cast | Made


@dataclass(frozen=True)
class ModelPlan:
    """A model directory to be written."""

    form: Form
    steps: tuple[Step, ...]
    files: tuple[Path, ...]

    @property
    def weight_bytes(self) -> int:
        return sum(spec.nbytes for step in self.steps for spec in step.outputs)


def plan_model(base: BaseModel, form: Form, checkpoint: Checkpoint) -> ModelPlan:
    """Every tensor and file of the model directory. Raises BaseUnreadable when no tokenizer is anywhere."""
    pairs = checkpoint.pairs if form.merged_onto else {}
    if _is_untouched(base, form):
        steps: list[Step] = [Copied(spec) for spec in base.tensors.specs.values()]
    else:
        steps = [_plain_step(base, spec, form) for spec in base.others]
        steps += [_linear_step(base, linear, form, pairs.get(module)) for module, linear in base.linears.items()]
    steps.sort(key=lambda step: step.outputs[0].name)
    return ModelPlan(form, tuple(steps), _side_files(checkpoint, base))


def require_match(checkpoint: Checkpoint, base: BaseModel, *, merging: bool) -> None:
    """Raises BaseMismatch with everything that says the adapter wasn't trained on this base."""
    problems = [problem for pair in checkpoint.pairs.values() if (problem := _pair_problem(pair, base))]
    problems += _vocabulary_problems(checkpoint, base)
    if merging and HEAD in checkpoint.pairs and base.is_tied:
        problems.append(
            f"{HEAD} is adapted but shares its weights with the embedding, so the delta can't be merged into it alone: "
            "keep the adapter separate with --route adapter"
        )
    if problems:
        listed = "".join(f"\n  - {problem}" for problem in problems[:20])
        more = f"\n  … and {len(problems) - 20} more" if len(problems) > 20 else ""
        named = f" It names {checkpoint.base_name!r} as its base." if checkpoint.base_name else ""
        raise BaseMismatch(f"{checkpoint.root} was not trained on {base.root}.{named}{listed}{more}")


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
    """Whether the base's weights are written as they are."""
    return form.merged_onto is None and form.stored == base.settings


def _plain_step(base: BaseModel, spec: TensorSpec, form: Form) -> Step:
    """Embeddings, norms and biases stay as they are, except where the whole model changes its type: a float32 model
    is written in 16 bits. A single float32 tensor in a 16-bit model is there on purpose."""
    dtype = _dtype(base, form)
    if spec.dtype == base.tensors.specs[EMBEDDING].dtype != dtype:
        return Cast(TensorSpec(spec.name, dtype, spec.shape))
    return Copied(spec)


def _dtype(base: BaseModel, form: Form) -> str:
    return form.dtype or base.dtype


def _linear_step(base: BaseModel, linear: Linear, form: Form, pair: LoraPair | None) -> Step:
    stored = None if linear.is_head else form.stored
    simulated = form.merged_onto == "dequantized" and not linear.is_head
    if not (pair or stored or simulated or linear.settings):
        return _plain_step(base, base.tensors.specs[linear.weight], form)
    if stored:
        outputs = stored.specs(linear.module, linear.shape)
    else:
        outputs = (TensorSpec(linear.weight, _dtype(base, form), linear.shape),)
    return Made(linear, pair, stored, outputs)


def model_config(base: BaseModel, form: Form) -> dict[str, Any]:
    """config.json of the written model."""
    # _name_or_path is where somebody's disk had the model.
    config = {name: value for name, value in base.config.items() if name != "_name_or_path"}
    if _is_untouched(base, form):
        return config
    config.pop("quantization_config", None)
    config.pop("torch_dtype", None)
    config["dtype"] = DTYPES[_dtype(base, form)][1]
    if form.stored:
        config["quantization_config"] = form.stored.config()
    return config


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


def _pair_problem(pair: LoraPair, base: BaseModel) -> str | None:
    linear = base.linears.get(pair.module)
    if linear is None:
        return _missing(pair, base)
    if (pair.in_features, pair.out_features) != (linear.in_features, linear.out_features):
        return (
            f"{pair.module}: the adapter is for {pair.in_features} → {pair.out_features} features, "
            f"the base has {linear.in_features} → {linear.out_features}"
        )
    return None


def _missing(pair: LoraPair, base: BaseModel) -> str | None:
    if pair.module == HEAD and base.is_tied:
        return _tied_head_problem(pair, base)
    match = LAYER_LINEAR.fullmatch(pair.module)
    if match:
        return f"{pair.module}: the base has only {base.config['num_hidden_layers']} layers"
    return f"{pair.module}: the base has no such linear layer; it may be of another architecture"


def _tied_head_problem(pair: LoraPair, base: BaseModel) -> str | None:
    rows, columns = base.tensors.specs[EMBEDDING].shape
    if (pair.out_features, pair.in_features) == (rows, columns):
        return None
    return (
        f"{HEAD}: the adapter is for {pair.in_features} → {pair.out_features} features, the base has {columns} → {rows}"
    )


def _vocabulary_problems(checkpoint: Checkpoint, base: BaseModel) -> list[str]:
    """A tokenizer that came with the adapter must number tokens as the base does."""
    path = checkpoint.root / "tokenizer.json"
    if not path.is_file():
        return []
    tokens = _token_ids(path)
    beyond = sorted(token for token, number in tokens.items() if number >= base.vocabulary)
    if beyond:
        return [
            f"the checkpoint's tokenizer has {len(beyond)} tokens the base has no rows for "
            f"({', '.join(map(repr, beyond[:3]))}…): it was trained with a resized vocabulary of "
            f"{max(tokens.values()) + 1}, the base has {base.vocabulary}"
        ]
    theirs = base.root / "tokenizer.json"
    other = _token_ids(theirs) if theirs.is_file() else {}
    moved = sorted(token for token, number in tokens.items() if other.get(token, number) != number)
    if moved:
        return [
            f"the checkpoint's tokenizer numbers {len(moved)} tokens otherwise ({', '.join(map(repr, moved[:3]))}…)"
        ]
    return []


def _token_ids(path: Path) -> dict[str, int]:
    document = read_json(path, CheckpointUnreadable)
    try:
        vocabulary = document["model"]["vocab"]
        if isinstance(vocabulary, list):  # unigram: [token, score] in order
            tokens = {entry[0]: number for number, entry in enumerate(vocabulary)}
        else:
            tokens = {token: int(number) for token, number in vocabulary.items()}
        tokens |= {token["content"]: int(token["id"]) for token in document.get("added_tokens") or []}
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        raise CheckpointUnreadable(f"{path} is not a tokenizer of the tokenizers library. Copy it again.") from None
    return tokens
