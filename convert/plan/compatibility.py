"""Whether a checkpoint was trained on a base model: names, shapes and vocabulary are compared, all of them at once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from convert.artifact.json_files import read_json, shown
from convert.errors import BaseMismatch, CheckpointUnreadable, one_for_each_cause
from convert.inputs.adapter_checkpoint import Checkpoint, LoraWeights, TrainedRows
from convert.inputs.architecture import Architecture
from convert.inputs.base_model import BaseModel
from convert.inputs.model_config import head_dim
from convert.plan.weight_updates import WeightUpdate, WeightUpdates, is_weight_of_base
from convert.safetensors_io.tensors import TensorSpec

_MAX_LISTED = 20


def require_compatible(checkpoint: Checkpoint, base: BaseModel) -> None:
    """Raises BaseMismatch with every sign that the adapter was not trained on this base."""
    updates = WeightUpdates.of(checkpoint, base, separate=False)
    problems = [
        *_lora_problems(checkpoint, base),
        *_saved_weight_problems(checkpoint, base),
        *_base_layer_problems(checkpoint, base),
        *_missing_bias_problems(checkpoint, base),
        *_embedding_problems(checkpoint, base, updates),
        *_tokenizer_problems(checkpoint, base, updates.vocabulary),
    ]
    if problems:
        causes = one_for_each_cause(problems)
        listed = "".join(f"\n  - {problem}" for problem in causes[:_MAX_LISTED])
        more = f"\n  … and {len(causes) - _MAX_LISTED} more" if len(causes) > _MAX_LISTED else ""
        named = f" It names {checkpoint.base_name!r} as its base." if checkpoint.base_name else ""
        raise BaseMismatch(f"{checkpoint.root} was not trained on {base.root}.{named}{listed}{more}")


def _lora_problems(checkpoint: Checkpoint, base: BaseModel) -> Iterator[str]:
    """The head is checked with the embedding, since its rows depend on the vocabulary."""
    for module, weights in checkpoint.lora_weights.items():
        if module == base.architecture.head:
            continue
        linear = base.linears.get(module)
        if linear is None:
            yield _missing_linear(module, base)
        elif (weights.in_features, weights.out_features) != (linear.in_features, linear.out_features):
            yield _feature_problem(weights, linear.in_features, linear.out_features)
        elif weights.head_dim and weights.head_dim != (expected := head_dim(base.language_settings)):
            yield f"{module}: its rows are ordered in heads of {weights.head_dim}, the base has heads of {expected}"


def _missing_linear(module: str, base: BaseModel) -> str:
    if base.architecture.layer_of(module) is not None:
        return f"{module}: the base has only {base.language_settings['num_hidden_layers']} layers"
    own = ", ".join(name.rpartition(".")[2] for name in base.architecture.linears)
    if fused := base.architecture.fused_for(module):
        return f"{module}: in the base it is a part of {fused}: train on {own}"
    return (
        f"{module}: the base has no such linear layer; it may be of another architecture. For a "
        f"{base.config['model_type']} train on {own}"
    )


def _feature_problem(weights: LoraWeights, in_features: int, out_features: int) -> str:
    return (
        f"{weights.module}: the adapter is for {weights.in_features} → {weights.out_features} features, "
        f"the base has {in_features} → {out_features}"
    )


def _saved_weight_problems(checkpoint: Checkpoint, base: BaseModel) -> Iterator[str]:
    """A saved weight must replace one of the same shape. The embedding and the head are checked together."""
    for name, saved in checkpoint.adapter_state.saved_weights.items():
        if name in (base.architecture.embedding, base.architecture.head_weight):
            continue
        shape = _weight_shape(name, base)
        if shape is None:
            yield f"{name} was trained as a whole, the base has no such weight; it may be of another architecture"
        elif saved.spec.shape != shape:
            yield f"{name} was trained as a whole in the shape {list(saved.spec.shape)}, the base has {list(shape)}"


def _base_layer_problems(checkpoint: Checkpoint, base: BaseModel) -> Iterator[str]:
    """A copy of a layer's own weight is what the adapter was trained on, so it must be the base's weight."""
    for name, spec in checkpoint.adapter_state.base_layers.items():
        if not is_weight_of_base(spec, name, checkpoint, base):
            yield (
                f"{spec.name} is not the base's {name}: the adapter was trained on other weights, or on this base "
                "stored in another format. Give the base that it was trained on"
            )


def _missing_bias_problems(checkpoint: Checkpoint, base: BaseModel) -> Iterator[str]:
    """PEFT's rules: `all` trains every bias of the model, `lora_only` those of adapted layers."""
    setting, state = checkpoint.config.get("bias"), checkpoint.adapter_state
    biases = {spec.name for spec in base.language_specs if spec.name.endswith(".bias")}
    if setting == "lora_only":
        biases &= {f"{module}.bias" for module in state.lora_weights}
    missing = sorted(biases - state.saved_weights.keys()) if setting in ("all", "lora_only") else []
    if missing:
        yield (
            f"bias={setting!r} trained {missing[0]} and {len(missing) - 1} more biases, which the file does not hold: "
            "save the checkpoint again with PEFT's save_pretrained"
        )


def _weight_shape(name: str, base: BaseModel) -> tuple[int, ...] | None:
    """The shape of a weight of the base, before its quantization; None where it has no such weight."""
    if linear := base.linears.get(name.removesuffix(".weight")):
        return linear.shape
    spec = base.tensors.specs.get(name)
    return spec.shape if spec else None


def _embedding_problems(checkpoint: Checkpoint, base: BaseModel, updates: WeightUpdates) -> Iterator[str]:
    names = base.architecture
    embedding = updates.by_weight.get(names.embedding, WeightUpdate())
    has_own_head = updates.untie_head or not base.is_tied
    head = updates.by_weight.get(names.head_weight, WeightUpdate()) if has_own_head else embedding
    columns, rows = base.embedding.shape[1], updates.vocabulary
    if (head_rows := head.row_count(base.vocabulary)) != rows:
        yield (
            f"the vocabulary was resized, but only one of embedding ({rows} rows) and head ({head_rows} rows) "
            "is in the checkpoint: save it again with PEFT's save_embedding_layers=True"
        )
    yield from _update_problems(names.embedding, embedding, columns)
    yield from _update_problems(names.head_weight, head, columns)
    for name, trained in checkpoint.adapter_state.trained_rows.items():
        if name in (names.embedding, names.head_weight):
            yield from _row_problems(name, trained, rows, columns)
        else:
            yield f"{name}: rows of it were trained, the base has no such embedding"
    yield from _embedding_lora_problems(checkpoint, names, rows, columns)


def _update_problems(name: str, update: WeightUpdate, columns: int) -> Iterator[str]:
    if update.saved and not _has_columns(update.saved, columns):
        yield f"{name} was saved in the shape {list(update.saved.shape)}, the base has rows of {columns}"
    if update.trained_rows and update.lora_weights:
        yield f"{name}: both single rows and a delta of low rank were trained; only one of them is supported"


def _has_columns(spec: TensorSpec, columns: int) -> bool:
    return len(spec.shape) == 2 and spec.shape[1] == columns


def _embedding_lora_problems(checkpoint: Checkpoint, names: Architecture, rows: int, columns: int) -> Iterator[str]:
    """Problems of LoRA on the embedding and on the head."""
    all_weights = [*checkpoint.adapter_state.embedding_lora_weights.values()]
    if names.head in checkpoint.lora_weights:
        all_weights.append(checkpoint.lora_weights[names.head])
    for weights in all_weights:
        if weights.module not in (names.embedding_module, names.head):
            yield f"{weights.module}: the base has no such embedding; it may be of another architecture"
        elif (weights.in_features, weights.out_features) != (columns, rows):
            yield _feature_problem(weights, columns, rows)


def _row_problems(name: str, trained: TrainedRows, rows: int, columns: int) -> Iterator[str]:
    if trained.values.shape[1] != columns:
        yield f"{name}: the trained rows have {trained.values.shape[1]} columns, the base has {columns}"
    elif beyond := [index for index in trained.indices if index >= rows]:
        yield f"{name}: rows up to {max(beyond)} were trained, the base has {rows}"


def _tokenizer_problems(checkpoint: Checkpoint, base: BaseModel, rows: int) -> list[str]:
    """A tokenizer of the checkpoint must give each token the id that the base's tokenizer gives it.

    Every id must have a row in the embedding. `rows`: those of the embedding after the checkpoint's changes.
    """
    path = checkpoint.root / "tokenizer.json"
    if not path.is_file():
        return []
    token_ids = _token_ids(path)
    beyond = sorted(token for token, token_id in token_ids.items() if token_id >= rows)
    if beyond:
        return [
            f"the checkpoint's tokenizer has {len(beyond)} tokens the base has no rows for "
            f"({', '.join(map(repr, beyond[:3]))}…): it was trained with a resized vocabulary of "
            f"{max(token_ids.values()) + 1}, the base has {rows}: "
            "save the checkpoint again with its embeddings (PEFT: save_embedding_layers=True)"
        ]
    path_of_base = base.root / "tokenizer.json"
    ids_of_base = _token_ids(path_of_base) if path_of_base.is_file() else {}
    moved = sorted(token for token, token_id in token_ids.items() if ids_of_base.get(token, token_id) != token_id)
    if moved:
        return [
            f"the checkpoint's tokenizer gives {len(moved)} tokens other ids than the base's does "
            f"({', '.join(map(repr, moved[:3]))}…)"
        ]
    return []


def _token_ids(path: Path) -> dict[str, int]:
    """The ids of a tokenizer.json, the format of the tokenizers library. Raises CheckpointUnreadable."""
    document = read_json(path, CheckpointUnreadable)
    try:
        vocabulary = document["model"]["vocab"]
        if isinstance(vocabulary, list):  # Unigram lists [token, score] in the order of ids
            token_ids = {entry[0]: token_id for token_id, entry in enumerate(vocabulary)}
        else:
            token_ids = dict(vocabulary)
        token_ids |= {token["content"]: token["id"] for token in document.get("added_tokens") or []}
    except (KeyError, TypeError, ValueError, IndexError):
        raise CheckpointUnreadable(f"{path} is not a tokenizer of the tokenizers library. Copy it again.") from None
    wrong = next((item for item in token_ids.items() if type(item[0]) is not str or type(item[1]) is not int), None)
    if wrong:
        raise CheckpointUnreadable(
            f"{path}: the token {shown(wrong[0])} has the id {shown(wrong[1])}; expected a text and a whole number. "
            "Copy it again."
        )
    return token_ids
