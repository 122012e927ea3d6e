"""What a model does after its decoder: the output head, and its scaling or capping of the logits.

transformers' own forward of the model computes it (Granite divides the logits, Cohere multiplies them, Gemma 2 caps
them), from hidden states in the place of the decoder's, so that there is no table of families to keep.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def logits_of(causal_lm: Any, states: torch.Tensor) -> torch.Tensor:
    """Logits (positions, vocabulary) of a transformers model for hidden states (positions, width) of its decoder.

    Gradients flow as through the model. The decoder does not run.
    """
    import torch

    unused_ids = torch.zeros((1, len(states)), dtype=torch.long, device=states.device)
    with _decoder_giving(causal_lm, states[None]):
        logits: torch.Tensor = causal_lm(input_ids=unused_ids, use_cache=False).logits[0]
    return logits


@contextmanager
def _decoder_giving(causal_lm: Any, states: torch.Tensor) -> Iterator[None]:
    from transformers.modeling_outputs import BaseModelOutputWithPast

    decoder = causal_lm.get_decoder()
    decoder.forward = lambda *_args, **_settings: BaseModelOutputWithPast(last_hidden_state=states)
    try:
        yield
    finally:
        del decoder.forward  # of the instance; that of its class is seen again
