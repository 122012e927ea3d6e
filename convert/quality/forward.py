"""A float32 model over token ids, its head apart from the rest.

The logits of a position are the head's output for one state. That is all there is to the head in Llama, Mistral and
Qwen2; a model that scales or caps its logits afterwards would need more here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from convert.progress import Progress

if TYPE_CHECKING:
    import torch

# Positions whose distributions are in memory at once: 33 MB in float32 at a vocabulary of 128k.
BLOCK = 64


def run(
    model: Any, rows: Sequence[torch.Tensor], what: str, progress: Progress
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Each row of token ids (1, tokens) with the states (tokens - 1, width) behind its next tokens."""
    decoder = _causal(model).get_decoder()
    for done, row in enumerate(rows):
        progress(f"measuring {what}", done, len(rows))
        yield row, decoder(input_ids=row, use_cache=False).last_hidden_state[0, :-1]
    progress(f"measuring {what}", len(rows), len(rows))


def log_probs(model: Any, states: torch.Tensor) -> Iterator[torch.Tensor]:
    """Log-probabilities of the next token after each state, in blocks of (at most BLOCK, vocabulary)."""
    head = _head(model)
    for block in states.split(BLOCK):
        yield head(block).log_softmax(-1)


def picked(blocks: Iterable[torch.Tensor], row: torch.Tensor) -> torch.Tensor:
    """Of a row's distributions, the log-probability of the token that really came next: (tokens - 1)."""
    import torch

    wanted = row[0, 1:].split(BLOCK)
    return torch.cat([block.gather(1, ids[:, None])[:, 0] for block, ids in zip(blocks, wanted, strict=True)])


def merged_head(model: Any) -> torch.Tensor:
    """The head's weight with its adapter, if it has one, added for good: the model is of no use as base after it."""
    head = _head(model)
    if hasattr(head, "merge"):
        head.merge()
    weight: torch.Tensor = head.weight
    return weight


def _head(model: Any) -> Any:
    return _causal(model).get_output_embeddings()


def _causal(model: Any) -> Any:
    """Below PEFT's wrapper, with the adapter's layers in it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
