"""What fits on a GPU: bytes of weights, KV cache and adapters of a Llama-architecture model, as vLLM lays them out.

Weights, a token in the KV cache, the tokens of a cache and an adapter slot are exact: tests/deploy/test_size_engine.py
compares them with a running vLLM. The memory for computing (`working_bytes`) is an estimate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from serve.settings import RESERVED_SLOTS

VOCABULARY_STEP = 64  # vLLM pads the vocabulary to a multiple of it
BLOCK_TOKENS = 16  # vLLM's block of the KV cache on a GPU
_MODEL_VALUE_BYTES = 2  # bfloat16 and float16: activations, KV cache, adapters

# CUDA context, library handles and the CUDA graphs that vLLM records. Assumed, not measured on a GPU.
_FIXED_WORKING_BYTES = 1 << 30


@dataclass(frozen=True)
class WeightFormat:
    """How linear layers are stored. Embeddings, norms and the output layer always have 16 bits."""

    weight_bytes: float  # of one weight
    channel_bytes: float = 0  # of the scale of one output channel


STORED: Mapping[str, WeightFormat] = {
    "bfloat16": WeightFormat(2),
    "w8a8-int8": WeightFormat(1, 2),  # bfloat16 scales, by convert's compressed-tensors
    "fp8": WeightFormat(1, 2),
    "w4a16": WeightFormat(0.5 + 2 / 128),  # groups of 128
    "nf4": WeightFormat(0.5 + 4 / 64),  # blocks of 64, each with a float32 once it is loaded
}


@dataclass(frozen=True)
class Shape:
    """The sizes in a model's config.json on which memory depends."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool
    context: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Shape:
        """Raises KeyError if `config` is not that of a Llama-architecture model."""
        heads = config["num_attention_heads"]
        return cls(
            hidden=config["hidden_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            intermediate=config["intermediate_size"],
            vocabulary=config["vocab_size"],
            tied=bool(config.get("tie_word_embeddings", False)),
            context=config["max_position_embeddings"],
        )

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of the seven linear layers of one block."""
        attention, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return (
            (self.hidden, attention), (self.hidden, kv), (self.hidden, kv), (attention, self.hidden),
            (self.hidden, self.intermediate), (self.hidden, self.intermediate), (self.intermediate, self.hidden),
        )  # fmt: skip


def weight_bytes(shape: Shape, stored: WeightFormat) -> int:
    """The bytes of all weights after vLLM has loaded them."""
    block = sum(
        inputs * outputs * stored.weight_bytes + outputs * stored.channel_bytes for inputs, outputs in shape.linears
    )
    vocabulary = math.ceil(shape.vocabulary / VOCABULARY_STEP) * VOCABULARY_STEP
    embeddings = vocabulary * shape.hidden * (1 if shape.tied else 2)
    norms = (2 * shape.layers + 1) * shape.hidden
    return round(shape.layers * block) + (embeddings + norms) * _MODEL_VALUE_BYTES


def token_bytes(shape: Shape, kv_value_bytes: int = _MODEL_VALUE_BYTES) -> int:
    """The bytes of a token in the KV cache: key and value of every layer."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * kv_value_bytes


def cached_tokens(cache_bytes: int, bytes_of_token: int, block_tokens: int = BLOCK_TOKENS) -> int:
    """The tokens that a KV cache holds, in whole blocks."""
    return cache_bytes // (bytes_of_token * block_tokens) * block_tokens


def adapter_bytes(shape: Shape, rank: int) -> int:
    """The bytes of an adapter of all linear layers in host memory."""
    return shape.layers * sum(inputs + outputs for inputs, outputs in shape.linears) * rank * _MODEL_VALUE_BYTES


def slot_bytes(shape: Shape, max_rank: int) -> int:
    """The bytes of an engine slot (`max_active_adapters`). vLLM reserves the largest adapter that it accepts, including
    the embedding and the output layer, whether adapters change them or not."""
    embedding = output = shape.vocabulary + shape.hidden
    return adapter_bytes(shape, max_rank) + (embedding + output) * max_rank * _MODEL_VALUE_BYTES


def working_bytes(shape: Shape, sequences: int, batched_tokens: int) -> int:
    """An estimate of the bytes for computing: float32 logits and their copy while sampling, the widest activations of
    one step, and a fixed part."""
    logits = 2 * sequences * shape.vocabulary * 4
    widest = batched_tokens * (2 * shape.intermediate + 4 * shape.hidden) * _MODEL_VALUE_BYTES
    return logits + widest + _FIXED_WORKING_BYTES


@dataclass(frozen=True)
class SizingRequest:
    """A model, adapters and requests that should fit on a GPU."""

    memory_bytes: int  # of one GPU
    stored: str  # a key of STORED
    max_rank: int = 16  # 0: without adapters
    slots: int = 8  # `max_active_adapters`
    context: int = 8192
    utilization: float = 0.9  # vLLM's --gpu-memory-utilization
    gpus: int = 1  # tensor parallel
    kv_value_bytes: int = _MODEL_VALUE_BYTES
    sequences: int = 256  # vLLM's --max-num-seqs
    batched_tokens: int = 8192  # vLLM's --max-num-batched-tokens


@dataclass(frozen=True)
class Fit:
    """The memory of one GPU, in bytes. A negative `cache` means that the model does not fit."""

    weights: int
    slots: int  # with the one that is reserved for the check of a new revision
    working: int
    cache: int
    tokens: int  # in the KV cache
    sequences: float  # of the requested context length that fit into the KV cache


def fit(shape: Shape, request: SizingRequest) -> Fit:
    """Weights, slots and cache are divided over the GPUs of one replica; each GPU needs memory for computing."""
    weights = math.ceil(weight_bytes(shape, STORED[request.stored]) / request.gpus)
    reserved = (request.slots + RESERVED_SLOTS) * slot_bytes(shape, request.max_rank) if request.max_rank else 0
    slots = math.ceil(reserved / request.gpus)
    working = working_bytes(shape, request.sequences, request.batched_tokens)
    cache = int(request.memory_bytes * request.utilization) - weights - slots - working
    # A GPU holds whole heads: more GPUs than heads repeat them.
    share = math.ceil(shape.kv_heads / request.gpus) / shape.kv_heads
    bytes_of_token = round(token_bytes(shape, request.kv_value_bytes) * share)
    tokens = cached_tokens(max(cache, 0), bytes_of_token)
    return Fit(weights, slots, working, cache, tokens, tokens / request.context)
