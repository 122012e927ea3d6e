"""The reference: the function as trained, run once over everything that results are compared on.

The function as trained is the separate adapter on the weights that it was trained against, computed by PEFT in float32.
The base alone is measured in the same pass, with the adapter switched off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from convert.inputs.adapter_checkpoint import Checkpoint
from convert.inputs.base_model import BaseModel
from convert.inputs.chat.tokenizer import Tokenizer
from convert.progress import Progress
from convert.quality.canaries import Answer, Canary, ask
from convert.quality.models.layer_weights import weights_as_trained
from convert.quality.models.peft_reference import base_alone, changed_weights, with_adapter
from convert.quality.models.streamed_model import GROUP_TOKENS, StreamedModel
from convert.quality.reference_logits import ReferenceLogits
from convert.quality.text import Text
from convert.quality.tokenized_text import TokenizedText, tokenize
from convert.quantization.format import QuantizationFormat

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Reference:
    """The outputs of the function as trained, and of the base alone.

    `logits` has the distributions of the rows, and `kl_base` is their mean KL(reference || base) in nats per
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
    is_read_again = bool(canaries) or sum(row.shape[1] for row in tokens.all) > GROUP_TOKENS
    model = StreamedModel(
        base,
        weights_as_trained(base, quantizer, read_again=is_read_again),
        adapt=lambda plain: with_adapter(plain, checkpoint),
        held=changed_weights(checkpoint),
    )
    logits = ReferenceLogits(model, tokens)
    with torch.inference_mode():
        of_base = logits.compute(base_alone(model.model, checkpoint, base, quantizer), progress)
        answers = ask(model, opened_tokenizer, canaries, "reference", progress)
    model.release()
    weights = "original" if quantizer is None else "dequantized NF4"
    return Reference(
        description=f"{weights} weights with the separate adapter, float32",
        text=text,
        tokens=tokens,
        logits=logits,
        token_log_probs=of_base.expected_log_probs,
        base_token_log_probs=of_base.token_log_probs,
        kl_base=float(of_base.divergences.mean()),
        canaries=tuple(canaries),
        answers=answers,
    )
