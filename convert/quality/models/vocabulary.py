"""The two matrices with a row for each token of the vocabulary, of which only some rows are in memory at a time.

They hold a fifth of a model of 3 billion weights, and more of a smaller one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from convert.inputs.base_model import BaseModel

if TYPE_CHECKING:
    import torch

# The head's weights of this many bytes in float32 are in memory at once,
HEAD_BLOCK_BYTES = 64 << 20
# and logits of this many bytes: 128 positions at a vocabulary of 128k.
LOGITS_BYTES = 64 << 20


def head_weight_name(base: BaseModel) -> str:
    """The tensor that holds the head's weight: that of the embedding where the two are tied."""
    return base.architecture.embedding if base.is_tied else base.architecture.head_weight


def read_rows_of_tokens(base: BaseModel, embedding: Any, weight: Any) -> None:
    """Before the embedding runs, the rows of its token ids are read into its weight, each once."""
    import torch

    is_read = torch.zeros(base.vocabulary, dtype=torch.bool)

    def read(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        ids = inputs[0].unique()
        missing = ids[~is_read[ids]].tolist()
        for start, stop in _runs(missing):
            weight.data[start:stop] = base.tensors.read_rows(base.architecture.embedding, start, stop)
        is_read[missing] = True

    embedding.register_forward_pre_hook(read)


def multiply_by_blocks(base: BaseModel, head: Any) -> None:
    """Let the output head read its weight from the file, block by block, whenever it runs."""
    from torch.nn.functional import linear

    name = head_weight_name(base)
    rows, columns = base.tensors.specs[name].shape
    step = max(1, HEAD_BLOCK_BYTES // (4 * columns))

    def forward(states: torch.Tensor) -> torch.Tensor:
        logits = states.new_empty(*states.shape[:-1], rows)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            logits[..., start:stop] = linear(states, base.tensors.read_rows(name, start, stop).float())
        return logits if head.bias is None else logits + head.bias

    head.forward = forward


def positions_at_once(vocabulary: int) -> int:
    """How many positions have their distributions in memory at once."""
    return max(1, LOGITS_BYTES // (4 * vocabulary))


def _runs(ids: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The ranges, as (start, stop), of which ascending ids consist."""
    if not ids:
        return
    start = ids[0]
    for before, after in pairwise(ids):
        if after != before + 1:
            yield start, before + 1
            start = after
    yield start, ids[-1] + 1
