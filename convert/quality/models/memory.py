"""The memory that measuring takes, known from the headers of base and adapter."""

from __future__ import annotations

import math

from convert.inputs.adapter_checkpoint import Checkpoint
from convert.inputs.base_model import BaseModel
from convert.quality.models import layer_weights
from convert.quality.models.peft_reference import changed_weights
from convert.quality.models.streamed_model import GROUP_TOKENS, is_vocabulary_held
from convert.quality.models.vocabulary import HEAD_BLOCK_BYTES, LOGITS_BYTES

# While distributions are compared there are two of them, and of each its logits and what transformers makes of these.
_DISTRIBUTIONS = 6
# Python with torch, transformers, PEFT and bitsandbytes, once models have been made.
_LIBRARY_BYTES = 460 << 20


def measuring_bytes(base: BaseModel, checkpoint: Checkpoint, tokens: int) -> int:
    """The largest memory at one time of a process that measures on a text of so many tokens."""
    layer, decoder, weight = _sizes(base)
    stays = decoder if decoder <= layer_weights.CACHED_BYTES else 0
    width = base.embedding.shape[1]
    group = min(tokens, GROUP_TOKENS)
    # With the adapter and without it: what a layer gets, and what the decoder returns.
    states = 4 * 4 * group * width
    # Beside a weight in float32 there is another one while it is read: what it is converted from.
    in_layer = max(stays, layer) + weight
    head = min(HEAD_BLOCK_BYTES, 4 * math.prod(base.embedding.shape))
    in_head = stays + head * 3 // 2 + _DISTRIBUTIONS * min(LOGITS_BYTES, 4 * tokens * base.vocabulary)
    rows_of_tokens = 2 * 4 * width * min(tokens, base.vocabulary)
    # Of the reference and of the result.
    adapters = 2 * sum(4 * math.prod(spec.shape) for spec in checkpoint.adapter_state.specs)
    return _LIBRARY_BYTES + states + max(in_layer, in_head) + rows_of_tokens + adapters + _held(base, checkpoint)


def _sizes(base: BaseModel) -> tuple[int, int, int]:
    """Bytes in float32 of the largest decoder layer, of all of them, and of the largest weight in one."""
    layers: dict[int, int] = {}
    largest = 0
    for linear in base.linears.values():
        number = base.architecture.layer_of(linear.module)
        if number is not None:
            size = 4 * math.prod(linear.shape)
            layers[number] = layers.get(number, 0) + size
            largest = max(largest, size)
    return max(layers.values()), sum(layers.values()), largest


def _held(base: BaseModel, checkpoint: Checkpoint) -> int:
    """Bytes of embedding and head, for the reference and the result, where the adapter changes one of them."""
    if not is_vocabulary_held(base, changed_weights(checkpoint)):
        return 0
    matrices = 1 if base.is_tied else 2
    return 2 * matrices * 4 * math.prod(base.embedding.shape)
