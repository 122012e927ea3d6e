"""Whether a checkpoint was trained on a base: names, shapes and vocabulary, all differences at once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from convert.base_model import BaseModel
from convert.checkpoint import Checkpoint, Rows, Whole
from convert.edits import HEAD_WEIGHT, Edit, Edits
from convert.errors import BaseMismatch, CheckpointUnreadable
from convert.formats import EMBEDDING, HEAD, LAYER_LINEAR
from convert.tensors import read_json

_EMBEDDING_MODULE = EMBEDDING.removesuffix(".weight")
_FUSED = frozenset({"qkv_proj", "gate_up_proj", "query_key_value", "c_attn", "W_pack", "wqkv", "dense_h_to_4h"})
_MAX_LISTED = 20


def require_match(checkpoint: Checkpoint, base: BaseModel) -> None:
    """Raises BaseMismatch with everything that says the adapter wasn't trained on this base."""
    problems = [*_pair_problems(checkpoint, base), *_whole_problems(checkpoint, base)]
    edits = Edits.of(checkpoint, base, separate=False)
    problems += _embedding_problems(checkpoint, base, edits)
    problems += _vocabulary_problems(checkpoint, base, edits.vocabulary)
    if problems:
        listed = "".join(f"\n  - {problem}" for problem in problems[:_MAX_LISTED])
        more = f"\n  … and {len(problems) - _MAX_LISTED} more" if len(problems) > _MAX_LISTED else ""
        named = f" It names {checkpoint.base_name!r} as its base." if checkpoint.base_name else ""
        raise BaseMismatch(f"{checkpoint.root} was not trained on {base.root}.{named}{listed}{more}")


def _pair_problems(checkpoint: Checkpoint, base: BaseModel) -> Iterator[str]:
    for pair in checkpoint.pairs.values():
        if pair.module == HEAD:
            continue  # its rows depend on the vocabulary
        linear = base.linears.get(pair.module)
        if linear is None:
            yield _missing(pair.module, base)
        elif (pair.in_features, pair.out_features) != (linear.in_features, linear.out_features):
            yield (
                f"{pair.module}: the adapter is for {pair.in_features} → {pair.out_features} features, "
                f"the base has {linear.in_features} → {linear.out_features}"
            )
        elif pair.head_dim and pair.head_dim != (expected := _head_dim(base)):
            yield f"{pair.module}: its rows are ordered in heads of {pair.head_dim}, the base has heads of {expected}"


def _head_dim(base: BaseModel) -> int:
    size = base.config.get("head_dim") or base.config["hidden_size"] // base.config["num_attention_heads"]
    return int(size)


def _missing(module: str, base: BaseModel) -> str:
    if LAYER_LINEAR.fullmatch(module):
        return f"{module}: the base has only {base.config['num_hidden_layers']} layers"
    if module.rpartition(".")[2] in _FUSED:
        return (
            f"{module}: the base has no such linear layer; it is a fused one, whose parts are single layers here: "
            "train on q_proj, k_proj, v_proj, gate_proj and up_proj"
        )
    return f"{module}: the base has no such linear layer; it may be of another architecture"


def _whole_problems(checkpoint: Checkpoint, base: BaseModel) -> Iterator[str]:
    """Whole weights must be some of the base's, of the same shape. Embedding and head are looked at together."""
    for name, whole in checkpoint.contents.saved.items():
        if name not in (EMBEDDING, HEAD_WEIGHT) and (problem := _whole_problem(name, whole, base)):
            yield problem


def _whole_problem(name: str, whole: Whole, base: BaseModel) -> str | None:
    linear = base.linears.get(name.removesuffix(".weight"))
    stored = base.tensors.specs.get(name)
    if linear is None and stored is None:
        return f"{name} was trained as a whole, the base has no such weight; it may be of another architecture"
    shape = linear.shape if linear else stored.shape if stored else ()
    if whole.spec.shape != shape:
        return f"{name} was trained as a whole in the shape {list(whole.spec.shape)}, the base has {list(shape)}"
    return None


def _embedding_problems(checkpoint: Checkpoint, base: BaseModel, edits: Edits) -> Iterator[str]:
    columns = base.tensors.specs[EMBEDDING].shape[1]
    embedding = edits.of_weights.get(EMBEDDING, Edit())
    head = edits.of_weights.get(HEAD_WEIGHT, Edit()) if edits.untied or not base.is_tied else embedding
    rows = _rows_of(head, base.vocabulary)
    if rows != edits.vocabulary:
        yield (
            f"the vocabulary was resized, but only one of embedding ({edits.vocabulary} rows) and head ({rows} rows) "
            "is in the checkpoint: save it again with PEFT's save_embedding_layers=True"
        )
    for name, edit in ((EMBEDDING, embedding), (HEAD_WEIGHT, head)):
        if edit.saved and (len(edit.saved.shape) != 2 or edit.saved.shape[1] != columns):
            yield f"{name} was saved in the shape {list(edit.saved.shape)}, the base has rows of {columns}"
        if edit.rows and edit.pair:
            yield f"{name}: both single rows and a delta of low rank were trained; only one of them is supported"
    for name, trained in checkpoint.contents.rows.items():
        yield from _row_problems(name, trained, edits.vocabulary, columns)
    pairs = [*checkpoint.contents.embeddings.values()]
    pairs += [pair for module, pair in checkpoint.pairs.items() if module == HEAD]
    for pair in pairs:
        if pair.module not in (_EMBEDDING_MODULE, HEAD):
            yield f"{pair.module}: the base has no such embedding; it may be of another architecture"
        elif (pair.in_features, pair.out_features) != (columns, edits.vocabulary):
            yield (
                f"{pair.module}: the adapter is for {pair.in_features} → {pair.out_features} features, "
                f"the base has {columns} → {edits.vocabulary}"
            )


def _rows_of(edit: Edit, otherwise: int) -> int:
    return edit.saved.shape[0] if edit.saved else otherwise


def _row_problems(name: str, rows: Rows, vocabulary: int, columns: int) -> Iterator[str]:
    if name not in (EMBEDDING, HEAD_WEIGHT):
        yield f"{name}: rows of it were trained, the base has no such embedding"
    elif rows.values.shape[1] != columns:
        yield f"{name}: the trained rows have {rows.values.shape[1]} columns, the base has {columns}"
    elif beyond := [index for index in rows.indices if index >= vocabulary]:
        yield f"{name}: rows up to {max(beyond)} were trained, the base has {vocabulary}"


def _vocabulary_problems(checkpoint: Checkpoint, base: BaseModel, rows: int) -> list[str]:
    """A tokenizer that came with the adapter must number tokens as the base does."""
    path = checkpoint.root / "tokenizer.json"
    if not path.is_file():
        return []
    tokens = _token_ids(path)
    beyond = sorted(token for token, number in tokens.items() if number >= rows)
    if beyond:
        return [
            f"the checkpoint's tokenizer has {len(beyond)} tokens the base has no rows for "
            f"({', '.join(map(repr, beyond[:3]))}…): it was trained with a resized vocabulary of "
            f"{max(tokens.values()) + 1}, the base has {rows}: "
            "save the checkpoint again with its embeddings (PEFT: save_embedding_layers=True)"
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
