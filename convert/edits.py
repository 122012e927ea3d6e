"""What a checkpoint changes in its base, weight by weight.

Low-rank deltas of linear layers are one kind. The others have no place in an adapter that an engine can swap:

    saved         a weight as a whole                  modules_to_save, a resized vocabulary, a bias
    rows          rows of the embedding or the head    trainable tokens
    embeddings    a delta of the embedding             lora_embedding_A and _B
    magnitude     of a delta's sum with the base       DoRA

A merged model holds all of them. Beside a separate adapter all but the plain deltas are *baked*: written into a base
of its own. DoRA can't be, since its sum is not the base's alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from convert import lora
from convert.base_model import BaseModel
from convert.checkpoint import Checkpoint, LoraPair, Rows, Whole
from convert.formats import EMBEDDING, HEAD
from convert.tensors import DTYPES, FLOATS, TensorSpec

if TYPE_CHECKING:
    import torch

HEAD_WEIGHT = f"{HEAD}.weight"


@dataclass(frozen=True)
class Edit:
    """What becomes of one weight: taken from the checkpoint instead, its delta added, rows of it replaced."""

    saved: TensorSpec | None = None
    pair: LoraPair | None = None
    rows: Rows | None = None

    @property
    def is_empty(self) -> bool:
        return not (self.saved or self.pair or self.rows)

    @property
    def is_plain(self) -> bool:
        """At most a delta, so that rows of the weight can be treated each for itself."""
        return not (self.saved or self.rows or (self.pair and self.pair.magnitude))


@dataclass(frozen=True)
class Edits:
    """Everything that one route changes in the base, by name of the weight. `untied`: the head gets its own weight."""

    of_weights: Mapping[str, Edit] = field(default_factory=dict)
    untied: bool = False
    vocabulary: int = 0

    @classmethod
    def of(cls, checkpoint: Checkpoint, base: BaseModel, *, separate: bool) -> Edits:
        """`separate`: deltas of linear layers stay in the adapter. Reads weights only to see which equal the base's.

        Shapes and names are checked elsewhere (`plan.require_match`); what has no place in the base is ignored here.
        """
        saved = {
            name: whole for name, whole in checkpoint.contents.saved.items() if _changes(whole, name, checkpoint, base)
        }
        pairs = {} if separate else {f"{module}.weight": pair for module, pair in checkpoint.pairs.items()}
        pairs |= {f"{module}.weight": pair for module, pair in checkpoint.contents.embeddings.items()}
        rows = checkpoint.contents.rows
        names = saved.keys() | pairs.keys() | rows.keys()
        edits = {
            name: Edit(saved[name].spec if name in saved else None, pairs.get(name), rows.get(name)) for name in names
        }
        untied = False
        if base.is_tied:
            embedding, head = _tied(edits.pop(EMBEDDING, Edit()), edits.pop(HEAD_WEIGHT, Edit()), saved)
            untied = not _are_equal(embedding, head, checkpoint)
            edits[EMBEDDING] = embedding
            if untied:
                edits[HEAD_WEIGHT] = head
        found = {
            name: edit for name, edit in sorted(edits.items()) if not edit.is_empty or (untied and name == HEAD_WEIGHT)
        }
        return cls(found, untied, _height(found.get(EMBEDDING), base.vocabulary))

    @property
    def is_empty(self) -> bool:
        return not self.of_weights

    @property
    def touches_embedding(self) -> bool:
        """Whether the embedding, or a head that shares its weights, is another than the base's."""
        return EMBEDDING in self.of_weights or HEAD_WEIGHT in self.of_weights

    @property
    def sentence(self) -> str:
        """Why a base is written for one adapter alone. Empty where it is not."""
        if self.is_empty:
            return ""
        names = [name for name, edit in self.of_weights.items() if not edit.is_empty]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return (
            f"What was trained beside LoRA ({', '.join(names[:3])}{more}) is written into the base, since no adapter "
            "can hold it: that base belongs to this adapter alone."
        )


@dataclass(frozen=True)
class Patch:
    """An edit with its small tensors in memory, ready for any rows of its weight."""

    halves: tuple[torch.Tensor, torch.Tensor] | None
    scaling: float
    magnitude: torch.Tensor | None
    indices: torch.Tensor | None
    values: torch.Tensor | None

    @classmethod
    def of(cls, edit: Edit, checkpoint: Checkpoint) -> Patch:
        import torch

        pair, rows = edit.pair, edit.rows
        return cls(
            halves=checkpoint.read(pair) if pair else None,
            scaling=pair.scaling if pair else 0.0,
            magnitude=checkpoint.tensors.read(pair.magnitude.name) if pair and pair.magnitude else None,
            indices=torch.tensor(rows.indices) if rows else None,
            values=checkpoint.tensors.read(rows.values.name) if rows else None,
        )

    def apply(self, weight: torch.Tensor, first: int = 0) -> torch.Tensor:
        """Rows `first` and following of the weight, float32 (rows, in), edited in place."""
        end = first + weight.shape[0]
        if self.halves:
            a, b = self.halves
            lora.add_delta(weight, a, b[first:end], self.scaling)
        if self.magnitude is not None:
            lora.normalised(weight, self.magnitude[first:end])
        if self.indices is not None and self.values is not None:
            here = (self.indices >= first) & (self.indices < end)
            weight[self.indices[here] - first] = self.values[here].float()
        return weight


def edited(weight: torch.Tensor, edit: Edit, checkpoint: Checkpoint) -> torch.Tensor:
    """A whole weight of the base in float32, as the edit leaves it. It may be changed in place."""
    if edit.saved:
        weight = checkpoint.tensors.read(edit.saved.name).float()
    return Patch.of(edit, checkpoint).apply(weight)


def _tied(embedding: Edit, head: Edit, saved: Mapping[str, Whole]) -> tuple[Edit, Edit]:
    """Both as they were in training, where they began as one weight.

    The base's own weight is shared, whoever of them it was saved for; copies beside it and deltas are not. Trained
    rows of the embedding are the head's too, unless it has its own (PEFT's rule).
    """
    own = next((saved[n].spec for n in (EMBEDDING, HEAD_WEIGHT) if n in saved and not saved[n].beside), None)
    return (
        Edit(embedding.saved or own, embedding.pair, embedding.rows),
        Edit(head.saved or own, head.pair, head.rows or embedding.rows),
    )


def _are_equal(embedding: Edit, head: Edit, checkpoint: Checkpoint) -> bool:
    """Whether a tied embedding and head still have the same values."""
    if not _are_equal_rows(embedding.rows, head.rows, checkpoint):
        return False
    if bool(embedding.saved) != bool(head.saved) or bool(embedding.pair) != bool(head.pair):
        return False
    if embedding.saved and head.saved and not _have_equal_bytes(embedding.saved, head.saved, checkpoint):
        return False
    return not embedding.pair or not head.pair or _are_equal_pairs(embedding.pair, head.pair, checkpoint)


def _are_equal_rows(one: Rows | None, other: Rows | None, checkpoint: Checkpoint) -> bool:
    if one is None or other is None:
        return one is other
    return one.indices == other.indices and _have_equal_bytes(one.values, other.values, checkpoint)


def _are_equal_pairs(one: LoraPair, other: LoraPair, checkpoint: Checkpoint) -> bool:
    import torch

    same = zip(checkpoint.read(one), checkpoint.read(other), strict=True)
    return one.scaling == other.scaling and all(torch.equal(left, right) for left, right in same)


def _have_equal_bytes(one: TensorSpec, other: TensorSpec, checkpoint: Checkpoint) -> bool:
    if one.name == other.name:
        return True
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return _are_equal_streams(checkpoint.tensors.chunks(one.name), checkpoint.tensors.chunks(other.name))


def _are_equal_streams(left: Iterator[bytes], right: Iterator[bytes]) -> bool:
    return all(one == other for one, other in zip(left, right, strict=True))


def _changes(whole: Whole, name: str, checkpoint: Checkpoint, base: BaseModel) -> bool:
    """False for a copy of what the base has: PEFT saves embeddings that nobody trained."""
    import torch

    theirs = base.tensors.specs.get(EMBEDDING if name == HEAD_WEIGHT and base.is_tied else name)
    if theirs is None or theirs.shape != whole.spec.shape or theirs.dtype not in FLOATS:
        return True
    if theirs.dtype == whole.spec.dtype:
        chunks = base.tensors.chunks(theirs.name)
        return not _are_equal_streams(checkpoint.tensors.chunks(whole.spec.name), chunks)
    dtype = getattr(torch, DTYPES[whole.spec.dtype][1])
    return not torch.equal(checkpoint.tensors.read(whole.spec.name), base.tensors.read(theirs.name).to(dtype))


def _height(edit: Edit | None, rows: int) -> int:
    """How many rows a weight has after its edit."""
    return edit.saved.shape[0] if edit and edit.saved else rows
