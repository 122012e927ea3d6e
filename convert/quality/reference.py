"""The reference: the function as trained, run once over everything that results are compared on.

The function as trained is the separate adapter on the weights that it was trained against, computed by PEFT in float32.
The base alone is measured too, with the adapter switched off. Then the model is freed.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.inputs.adapter_checkpoint import Checkpoint
from convert.inputs.base_model import BaseModel
from convert.inputs.chat.tokenizer import Tokenizer
from convert.progress import Progress
from convert.quality.canaries import Answer, Canary, ask
from convert.quality.float32_model import hidden_states, load, log_probs, token_log_probs
from convert.quality.peft_reference import base_alone, with_adapter
from convert.quality.reference_logits import ReferenceLogits
from convert.quality.text import Text
from convert.quality.tokenized_text import TokenizedText, tokenize
from convert.quantization.format import QuantizationFormat

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Reference:
    """The outputs of the function as trained, and of the base alone.

    `logits` has the distributions of the measured rows, and `kl_base` is their mean KL(reference || base) in nats per
    token: how far training moved the model. `token_log_probs` and `base_token_log_probs` hold, for each row
    of `tokens.all`, a tensor (tokens - 1) with the log-probability of every token but the first. `answers`: the
    answers to the canaries.
    """

    description: str
    text: Text
    tokens: TokenizedText
    logits: ReferenceLogits
    token_log_probs: tuple[torch.Tensor, ...]
    base_token_log_probs: tuple[torch.Tensor, ...]
    kl_base: float
    canaries: tuple[Canary, ...]
    answers: tuple[Answer, ...]


def compute_reference(
    checkpoint: Checkpoint,
    base: BaseModel,
    quantizer: QuantizationFormat | None,
    tokenizer: Path,
    text: Text,
    progress: Progress,
    canaries: Sequence[Canary] = (),
) -> Reference:
    """Run the function as trained over the text, and ask it the canaries.

    `quantizer`: of the base in training, None for LoRA. `tokenizer`: the directory whose tokenizer and chat template
    will be served; every result that is compared with this reference must have the same ones.
    """
    import torch

    opened_tokenizer = Tokenizer.open(tokenizer)
    tokens = tokenize(text, opened_tokenizer)
    model = with_adapter(load(base, quantizer), checkpoint)
    logits = ReferenceLogits()
    with torch.inference_mode():
        trained_log_probs = _trained_log_probs(model, tokens, logits, progress)
        answers = ask(model, opened_tokenizer, canaries, "reference", progress)
        logits.set_output_layers(model)
        with base_alone(model, checkpoint, base, quantizer):
            of_base = logits.compare(model, tokens, "base", progress)
    del model
    gc.collect()
    weights = "original" if quantizer is None else "dequantized NF4"
    return Reference(
        description=f"{weights} weights with the separate adapter, float32",
        text=text,
        tokens=tokens,
        logits=logits,
        token_log_probs=trained_log_probs,
        base_token_log_probs=of_base.token_log_probs,
        kl_base=float(of_base.divergences.mean()),
        canaries=tuple(canaries),
        answers=answers,
    )


def _trained_log_probs(
    model: Any, tokens: TokenizedText, logits: ReferenceLogits, progress: Progress
) -> tuple[torch.Tensor, ...]:
    """For each row of `tokens.all` the log-probability of every token but the first.

    The hidden states of the measured rows are stored in `logits`.
    """
    row_log_probs: list[torch.Tensor] = []
    for number, (row, states) in enumerate(hidden_states(model, tokens.all, "reference", progress)):
        if number < len(tokens.measured):
            logits.append(states)
        row_log_probs.append(token_log_probs(log_probs(model, states), row))
    return tuple(row_log_probs)
