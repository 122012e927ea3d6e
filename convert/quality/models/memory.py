"""What measuring takes: memory, temporary files and work, known from the headers of base and adapter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from convert.inputs.adapter_checkpoint import Checkpoint
from convert.inputs.base_model import BaseModel
from convert.inputs.model_config import setting
from convert.plan.phases import ALLOCATOR_BYTES, LIBRARY_BYTES, Work
from convert.quality.models import layer_weights
from convert.quality.models.peft_reference import changed_weights
from convert.quality.models.streamed_model import GROUP_TOKENS, is_vocabulary_held
from convert.quality.models.vocabulary import HEAD_BLOCK_BYTES, LOGITS_BYTES, positions_at_once
from convert.quantization.format import QuantizationFormat
from convert.quantization.nf4 import Nf4
from convert.safetensors_io.tensors import DTYPES

# Two distributions are compared. Of each there are the logits and what is made of them, of the block before as well.
_DISTRIBUTIONS = 6
# What is alive for each weight while it is read into its place: as stored, and in float32. compressed-tensors makes the
# codes float32, and multiplies them into another tensor.
_OF_NF4 = 5
_OF_COMPRESSED = 9.5
# The retention of a weight: the written one, that of the base and the delta, all float32, and what each is read from.
_OF_RETENTION = 22


@dataclass(frozen=True)
class Prompts:
    """The canaries of one batch: how many there are, and the length to which they are padded, in tokens."""

    count: int
    tokens: int


@dataclass(frozen=True)
class MeasuredModels:
    """The function as trained and its text. `tokens`: of all rows; `quantizer`: of the base in training."""

    base: BaseModel
    checkpoint: Checkpoint
    quantizer: QuantizationFormat | None
    tokens: int
    canaries: Sequence[Prompts] = ()
    answer_tokens: int = 0

    def reference_bytes(self) -> int:
        """Memory while the function as trained is measured."""
        return self._bytes(self._read_bytes(self.quantizer or self.base.quantization_format), 0)

    def result_bytes(self, stored: QuantizationFormat | None, adapter_bytes: int) -> int:
        """Memory while a result is measured. `stored`: the format of its linear layers; `adapter_bytes`: of its own."""
        return self._bytes(self._read_bytes(stored), adapter_bytes)

    def retention_bytes(self) -> int:
        """Memory while the retention of each delta is measured."""
        shapes = [(weights.out_features, weights.in_features) for weights in self.checkpoint.lora_weights.values()]
        return LIBRARY_BYTES + _OF_RETENTION * max(map(math.prod, shapes), default=0)

    def temporary_bytes(self) -> int:
        """Temporary files: the states of the reference, and the codes of weights that are read more than once."""
        states = 4 * self.tokens * self.base.embedding.shape[1]
        is_read_again = bool(self.canaries) or self.tokens > GROUP_TOKENS
        if self.quantizer is None or self.base.quantization_format or not is_read_again:
            return states
        codes = sum(
            spec.nbytes for each in self.base.layer_linears for spec in self.quantizer.specs(each.module, each.shape)
        )
        return states + codes

    def reference_work(self) -> Work:
        """The function as trained and the base alone go through each layer together."""
        weights, head = self._weights
        read = weights * (1 if self._stays else self._groups)
        is_stored = self.quantizer is not None and self._groups > 1
        return Work(
            read_as_trained=weights if is_stored else read,
            read_stored=2 * self._head_reads * head + (read - weights if is_stored else 0),
            products=2 * self.tokens * (weights + head) + self._asked(weights, head),
            compared=self.tokens,
        )

    def result_work(self) -> Work:
        """The result goes through the layers; the reference's distributions are computed again."""
        weights, head = self._weights
        return Work(
            read_stored=2 * self._head_reads * head
            + weights * (1 if self._stays else self._groups + self.answer_tokens * len(self.canaries)),
            products=self.tokens * (weights + 2 * head) + self._asked(weights, head),
            compared=self.tokens,
        )

    @property
    def _weights(self) -> tuple[int, int]:
        """Of the linear layers of all decoder layers, and of the head."""
        layers = sum(math.prod(linear.shape) for linear in self.base.layer_linears)
        return layers, math.prod(self.base.embedding.shape)

    @property
    def _stays(self) -> bool:
        return _sizes(self.base)[1] <= layer_weights.CACHED_BYTES

    @property
    def _groups(self) -> int:
        return math.ceil(self.tokens / GROUP_TOKENS)

    @property
    def _head_reads(self) -> int:
        return math.ceil(self.tokens / positions_at_once(self.base.vocabulary))

    def _asked(self, weights: int, head: int) -> int:
        """Products of the answers to the canaries."""
        tokens = sum(batch.count * (batch.tokens + self.answer_tokens) for batch in self.canaries)
        return tokens * weights + sum(batch.count * self.answer_tokens for batch in self.canaries) * head

    def _bytes(self, read_bytes: float, second_adapter: int) -> int:
        base, width = self.base, self.base.embedding.shape[1]
        layer, decoder, largest = _sizes(base)
        # The memory of a layer is kept for the next one. All layers stay where they are small.
        layers = decoder if self._stays else layer
        group = min(self.tokens, GROUP_TOKENS)
        # With the adapter and without it: what a layer gets, and what the decoder returns.
        states = 4 * 4 * group * width
        while_read = math.ceil(read_bytes * largest / 4)
        head = min(HEAD_BLOCK_BYTES, 4 * math.prod(base.embedding.shape))
        # Rows of the head as stored, in float32, and their logits.
        logits = min(LOGITS_BYTES, 4 * self.tokens * base.vocabulary)
        in_head = head * 3 // 2 + min(logits, logits * head // (4 * math.prod(base.embedding.shape)))
        rows_of_tokens = 2 * 4 * width * min(self.tokens, base.vocabulary)
        adapter = sum(4 * math.prod(spec.shape) for spec in self.checkpoint.adapter_state.specs)
        alive = states + rows_of_tokens + adapter + second_adapter + _held(base, self.checkpoint) + ALLOCATOR_BYTES
        comparing = max(while_read, in_head + _DISTRIBUTIONS * logits, self._asking_bytes())
        return LIBRARY_BYTES + alive + layers + comparing

    def _asking_bytes(self) -> int:
        """Keys and values of all layers in float32, copied when a token is added, and the scores of one layer."""
        config = self.base.language_settings
        heads = int(config.get("num_attention_heads") or setting(self.base.config, "num_attention_heads"))
        layers = int(config.get("num_hidden_layers") or setting(self.base.config, "num_hidden_layers"))
        keys = [linear.out_features for linear in self.base.linears.values() if linear.module.endswith("k_proj")]
        width = max(keys, default=self.base.embedding.shape[1])
        largest = 0
        for batch in self.canaries:
            length = batch.tokens + self.answer_tokens
            cache = 2 * 4 * batch.count * length * width * layers
            largest = max(largest, 2 * cache + 3 * 4 * batch.count * heads * length * length)
        return largest

    def _read_bytes(self, stored: QuantizationFormat | None) -> float:
        if stored is None:
            return DTYPES[self.base.dtype][0] + 4
        return _OF_NF4 if isinstance(stored, Nf4) else _OF_COMPRESSED


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
