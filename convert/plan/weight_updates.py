"""The changes that a checkpoint makes in its base model, weight by weight.

    lora_weights    a low-rank delta is added                     LoRA on a linear layer or on the embedding
      magnitude     … and the sum is rescaled                     DoRA
    saved           the whole weight is replaced                  modules_to_save, a resized vocabulary, a bias
    trained_rows    rows of the embedding or head are replaced    trainable tokens

A merged model has all of these changes. A separate adapter can hold only the low-rank deltas of linear layers; the
other changes are written into a base model of its own. DoRA can't be split: it rescales the sum of base and delta.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from convert.inputs import lora
from convert.inputs.adapter_checkpoint import Checkpoint, LoraWeights, SavedWeight, TrainedRows
from convert.inputs.architecture import Architecture
from convert.inputs.base_model import BaseModel
from convert.safetensors_io.tensors import DTYPES, FLOATS, TensorSpec

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class WeightUpdate:
    """What changes in one weight: it is replaced by `saved`, then a delta is added, then rows are replaced."""

    saved: TensorSpec | None = None
    lora_weights: LoraWeights | None = None
    trained_rows: TrainedRows | None = None

    @property
    def is_empty(self) -> bool:
        return not (self.saved or self.lora_weights or self.trained_rows)

    @property
    def is_by_row(self) -> bool:
        """Whether rows of the weight can be computed one after the other: at most a delta without DoRA is added."""
        return not (self.saved or self.trained_rows or (self.lora_weights and self.lora_weights.magnitude))

    def row_count(self, base_rows: int) -> int:
        """The rows of the changed weight, where the base's has `base_rows`."""
        return self.saved.shape[0] if self.saved else base_rows


@dataclass(frozen=True)
class WeightUpdates:
    """Every change of the base model for one route, by the name of the weight.

    `architecture`: of the base. `untie_head`: the head shares the embedding's weight in the base, and gets its own.
    `vocabulary`: rows of the changed embedding.
    """

    by_weight: Mapping[str, WeightUpdate]
    architecture: Architecture
    untie_head: bool
    vocabulary: int

    @classmethod
    def of(cls, checkpoint: Checkpoint, base: BaseModel, *, separate: bool) -> WeightUpdates:
        """`separate`: deltas of linear layers stay in the adapter. Reads weights only to compare them with the base's.

        Weights that the base doesn't have are left out; `compatibility.require_compatible` checks names and shapes.
        """
        saved = _changed_weights(checkpoint, base)
        updates = _updates(checkpoint, saved, separate=separate)
        names = base.architecture
        untie_head = False
        if base.is_tied:
            embedding = updates.pop(names.embedding, WeightUpdate())
            head = updates.pop(names.head_weight, WeightUpdate())
            embedding, head = _tied_updates(embedding, head, _shared_weight(saved, names))
            untie_head = not _have_equal_results(embedding, head, checkpoint)
            if not embedding.is_empty:
                updates[names.embedding] = embedding
            if untie_head:
                updates[names.head_weight] = head
        vocabulary = updates.get(names.embedding, WeightUpdate()).row_count(base.vocabulary)
        return cls(dict(sorted(updates.items())), names, untie_head, vocabulary)

    @property
    def is_empty(self) -> bool:
        return not self.by_weight

    @property
    def changes_embedding(self) -> bool:
        """Whether the embedding changes, or a head that shares its weight."""
        return self.architecture.embedding in self.by_weight or self.architecture.head_weight in self.by_weight

    @property
    def reason(self) -> str:
        """Why a base model is written for one adapter alone; empty where none is."""
        if self.is_empty:
            return ""
        names = [name for name, update in self.by_weight.items() if not update.is_empty]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return (
            f"What was trained beside LoRA ({', '.join(names[:3])}{more}) is written into the base, since no adapter "
            "can hold it: that base belongs to this adapter alone."
        )


@dataclass(frozen=True)
class LoadedUpdate:
    """An update with its small tensors in memory, to be applied to any rows of its weight."""

    lora_weights: tuple[torch.Tensor, torch.Tensor] | None
    """A and B."""
    scaling: float
    magnitude: torch.Tensor | None
    row_indices: torch.Tensor | None
    row_values: torch.Tensor | None

    @classmethod
    def of(cls, update: WeightUpdate, checkpoint: Checkpoint) -> LoadedUpdate:
        import torch

        weights, rows = update.lora_weights, update.trained_rows
        return cls(
            lora_weights=checkpoint.read(weights) if weights else None,
            scaling=weights.scaling if weights else 0.0,
            magnitude=checkpoint.tensors.read(weights.magnitude.name) if weights and weights.magnitude else None,
            row_indices=torch.tensor(rows.indices) if rows else None,
            row_values=checkpoint.tensors.read(rows.values.name) if rows else None,
        )

    def apply(self, weight: torch.Tensor, first: int = 0) -> torch.Tensor:
        """Change rows `first` and following of the weight in place; float32 (rows, in)."""
        end = first + weight.shape[0]
        if self.lora_weights:
            a, b = self.lora_weights
            lora.add_delta(weight, a, b[first:end], self.scaling)
        if self.magnitude is not None:
            lora.dora_rescale(weight, self.magnitude[first:end])
        if self.row_indices is not None and self.row_values is not None:
            here = (self.row_indices >= first) & (self.row_indices < end)
            weight[self.row_indices[here] - first] = self.row_values[here].float()
        return weight


def updated_weight(weight: torch.Tensor, update: WeightUpdate, checkpoint: Checkpoint) -> torch.Tensor:
    """The changed weight in float32. `weight`, a complete weight of the base in float32, may be changed in place."""
    if update.saved:
        weight = checkpoint.tensors.read(update.saved.name).float()
    return LoadedUpdate.of(update, checkpoint).apply(weight)


def _updates(checkpoint: Checkpoint, saved: Mapping[str, SavedWeight], *, separate: bool) -> dict[str, WeightUpdate]:
    state = checkpoint.adapter_state
    modules = state.embedding_lora_weights if separate else {**state.lora_weights, **state.embedding_lora_weights}
    lora_weights = {f"{module}.weight": weights for module, weights in modules.items()}
    return {
        name: WeightUpdate(
            saved[name].spec if name in saved else None, lora_weights.get(name), state.trained_rows.get(name)
        )
        for name in saved.keys() | lora_weights.keys() | state.trained_rows.keys()
    }


def _changed_weights(checkpoint: Checkpoint, base: BaseModel) -> dict[str, SavedWeight]:
    """The saved weights without copies of the base's own: PEFT also saves embeddings that nobody trained."""
    return {
        name: saved
        for name, saved in checkpoint.adapter_state.saved_weights.items()
        if not is_weight_of_base(saved.spec, name, checkpoint, base)
    }


def is_weight_of_base(saved: TensorSpec, name: str, checkpoint: Checkpoint, base: BaseModel) -> bool:
    """Whether a tensor of the adapter file is the base's tensor of that name, perhaps rounded to another type."""
    import torch

    names = base.architecture
    own = base.tensors.specs.get(names.embedding if name == names.head_weight and base.is_tied else name)
    if own is None or own.shape != saved.shape:
        return False
    if own.dtype == saved.dtype:
        return checkpoint.tensors.has_bytes_of(saved.name, base.tensors, own.name)
    if own.dtype not in FLOATS or saved.dtype not in FLOATS:
        return False
    dtype = getattr(torch, DTYPES[saved.dtype][1])
    return bool(torch.equal(checkpoint.tensors.read(saved.name), base.tensors.read(own.name).to(dtype)))


def _shared_weight(saved: Mapping[str, SavedWeight], names: Architecture) -> TensorSpec | None:
    """The base's own weight of a tied embedding and head, if the checkpoint saved it."""
    of_both = (saved[name] for name in (names.embedding, names.head_weight) if name in saved)
    return next((weight.spec for weight in of_both if not weight.is_trained_copy), None)


def _tied_updates(
    embedding: WeightUpdate, head: WeightUpdate, shared: TensorSpec | None
) -> tuple[WeightUpdate, WeightUpdate]:
    """The updates of a tied embedding and head as they were in training.

    PEFT's rules: the base's own weight is `shared`, whichever of the two it was saved for; trained copies and deltas
    are not shared. Trained rows of the embedding are the head's too, unless the head has its own.
    """
    return (
        WeightUpdate(embedding.saved or shared, embedding.lora_weights, embedding.trained_rows),
        WeightUpdate(head.saved or shared, head.lora_weights, head.trained_rows or embedding.trained_rows),
    )


def _have_equal_results(embedding: WeightUpdate, head: WeightUpdate, checkpoint: Checkpoint) -> bool:
    """Whether a tied embedding and head still have the same values after their updates."""
    return (
        _are_equal_rows(embedding.trained_rows, head.trained_rows, checkpoint)
        and _are_equal_tensors(embedding.saved, head.saved, checkpoint)
        and _are_equal_lora_weights(embedding.lora_weights, head.lora_weights, checkpoint)
    )


def _are_equal_rows(first: TrainedRows | None, second: TrainedRows | None, checkpoint: Checkpoint) -> bool:
    if first is None or second is None:
        return first is second
    return first.indices == second.indices and _are_equal_tensors(first.values, second.values, checkpoint)


def _are_equal_lora_weights(first: LoraWeights | None, second: LoraWeights | None, checkpoint: Checkpoint) -> bool:
    import torch

    if first is None or second is None:
        return first is second
    matrices = zip(checkpoint.read(first), checkpoint.read(second), strict=True)
    return first.scaling == second.scaling and all(torch.equal(left, right) for left, right in matrices)


def _are_equal_tensors(first: TensorSpec | None, second: TensorSpec | None, checkpoint: Checkpoint) -> bool:
    if first is None or second is None:
        return first is second
    return first.name == second.name or checkpoint.tensors.has_bytes_of(first.name, checkpoint.tensors, second.name)
