"""The function as trained, run once over everything that results are compared on.

The weights the adapter was trained against with the adapter beside them, computed by PEFT in float32; in the same
pass the base alone, with the adapter switched off. Then the model is freed.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from convert.as_trained import with_adapter
from convert.base_model import BaseModel
from convert.checkpoint import Checkpoint
from convert.progress import Progress
from convert.quality.canaries import Answer, Canary, ask
from convert.quality.forward import log_probs, merged_head, picked, run
from convert.quality.kept import Kept
from convert.quality.model import load
from convert.quality.rows import Rows, tokenize
from convert.quality.text import Text
from convert.quality.tokenizer import Tokenizer
from convert.scheme import Scheme

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Reference:
    """What the function as trained, and the base alone, say.

    `kept` has the distributions of the measured rows; `own` and `base` hold, for each row of `rows.all`, the
    log-probability of every token but the first: of the function as trained, of the base alone.
    """

    description: str
    text: Text
    rows: Rows
    kept: Kept
    own: tuple[torch.Tensor, ...]
    base: tuple[torch.Tensor, ...]
    canaries: tuple[Canary, ...]
    answers: tuple[Answer, ...]


def reference(
    checkpoint: Checkpoint,
    base: BaseModel,
    quantizer: Scheme | None,
    tokenizer: Path,
    text: Text,
    progress: Progress,
    canaries: Sequence[Canary] = (),
) -> Reference:
    """Run the function as trained over the text, and ask it the canaries.

    `quantizer`: of training, None for LoRA. `tokenizer`: the directory whose tokenizer and chat template will be
    served, which every result compared with this reference must share.
    """
    import torch

    words = Tokenizer.open(tokenizer)
    rows = tokenize(text, words)
    model = with_adapter(load(base, quantizer), checkpoint)
    kept = Kept()
    own: list[torch.Tensor] = []
    with torch.inference_mode():
        for row, states in run(model, rows.all, "reference", progress):
            if len(own) < len(rows.measured):
                kept.append(states)
            own.append(picked(log_probs(model, states), row))
        answers = ask(model, words, canaries, "reference", progress)
        with model.disable_adapter():
            alone = [picked(log_probs(model, states), row) for row, states in run(model, rows.all, "base", progress)]
        kept.set_head(merged_head(model))
    del model
    gc.collect()
    weights = "original" if quantizer is None else "dequantized NF4"
    description = f"{weights} weights with the separate adapter, float32"
    return Reference(description, text, rows, kept, tuple(own), tuple(alone), tuple(canaries), answers)
