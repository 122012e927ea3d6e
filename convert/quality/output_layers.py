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


def output_layers(causal_lm: Any, head_weight: torch.Tensor) -> Any:
    """A model for `logits_of` alone: like `causal_lm` after the decoder, with another head weight (vocabulary, width).

    It holds no other weight than that and the head's bias, where the architecture has one.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(causal_lm.config, dtype=head_weight.dtype)
    head = torch.nn.Linear(*reversed(head_weight.shape), bias=False, device="meta")
    head.weight = torch.nn.Parameter(head_weight, requires_grad=False)
    if (bias := getattr(causal_lm.get_output_embeddings(), "bias", None)) is not None:
        head.bias = torch.nn.Parameter(bias.detach().clone(), requires_grad=False)
    model.set_output_embeddings(head)
    return model.eval()


@contextmanager
def _decoder_giving(causal_lm: Any, states: torch.Tensor) -> Iterator[None]:
    from transformers.modeling_outputs import BaseModelOutputWithPast

    decoder = causal_lm.get_decoder()
    decoder.forward = lambda *_args, **_settings: BaseModelOutputWithPast(last_hidden_state=states)
    try:
        yield
    finally:
        del decoder.forward  # of the instance; that of its class is seen again
