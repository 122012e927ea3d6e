"""What fits: bytes of weights, KV cache and adapters of a Llama-architecture model, as vLLM lays them out.

Exact, and compared with a running vLLM by tests/deploy/test_size_engine.py: weights, bytes of a token in the KV cache,
tokens that a cache of some size holds, an adapter slot. An estimate: what computing takes (`working_bytes`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

VOCABULARY_STEP = 64  # vLLM makes embeddings a multiple of it long
BLOCK_TOKENS = 16  # vLLM's block of the KV cache on a GPU
_MODEL_VALUE_BYTES = 2  # bfloat16 and float16: activations, KV cache, adapters

# Of the CUDA context, the library's handles and the graphs that vLLM records; no GPU was at hand to measure it on.
_FIXED_WORKING_BYTES = 1 << 30


@dataclass(frozen=True)
class Stored:
    """How linear layers are stored: bytes of one weight, and of the scale of each output channel. Embeddings, norms
    and the output layer stay in 16 bits."""

    weight_bytes: float
    channel_bytes: float = 0


STORED: Mapping[str, Stored] = {
    "bfloat16": Stored(2),
    "w8a8-int8": Stored(1, 2),  # bfloat16 scales, by convert's compressed-tensors
    "fp8": Stored(1, 2),
    "w4a16": Stored(0.5 + 2 / 128),  # groups of 128
    "nf4": Stored(0.5 + 4 / 64),  # blocks of 64, with a float32 each once they are loaded
}


@dataclass(frozen=True)
class Shape:
    """The sizes in a model's config.json that memory depends on."""

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
        """Raises KeyError if it is no config.json of a Llama-architecture model."""
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
        """(in, out) of the seven linear layers of one block."""
        attention, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return (
            (self.hidden, attention), (self.hidden, kv), (self.hidden, kv), (attention, self.hidden),
            (self.hidden, self.intermediate), (self.hidden, self.intermediate), (self.intermediate, self.hidden),
        )  # fmt: skip


def weight_bytes(shape: Shape, stored: Stored) -> int:
    """Of the whole model, once vLLM has loaded it."""
    block = sum(into * out * stored.weight_bytes + out * stored.channel_bytes for into, out in shape.linears)
    vocabulary = math.ceil(shape.vocabulary / VOCABULARY_STEP) * VOCABULARY_STEP
    embeddings = vocabulary * shape.hidden * (1 if shape.tied else 2)
    norms = (2 * shape.layers + 1) * shape.hidden
    return round(shape.layers * block) + (embeddings + norms) * _MODEL_VALUE_BYTES


def token_bytes(shape: Shape, kv_value_bytes: int = _MODEL_VALUE_BYTES) -> int:
    """A token in the KV cache: key and value of every layer."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * kv_value_bytes


def cached_tokens(cache_bytes: int, bytes_of_token: int, block_tokens: int = BLOCK_TOKENS) -> int:
    """Tokens that a KV cache holds: whole blocks only."""
    return cache_bytes // (bytes_of_token * block_tokens) * block_tokens


def adapter_bytes(shape: Shape, rank: int) -> int:
    """An adapter of all linear layers, in the host's memory."""
    return shape.layers * sum(into + out for into, out in shape.linears) * rank * _MODEL_VALUE_BYTES


def slot_bytes(shape: Shape, max_rank: int) -> int:
    """An engine slot (`max_active_adapters`). vLLM makes room for the largest adapter that it would take: the
    embedding and the output layer too, whether adapters change them or not."""
    embedding = output = shape.vocabulary + shape.hidden
    return adapter_bytes(shape, max_rank) + (embedding + output) * max_rank * _MODEL_VALUE_BYTES


def working_bytes(shape: Shape, sequences: int, batched_tokens: int) -> int:
    """An estimate of what computing takes beside the rest: float32 logits and their copy while sampling, the widest
    activations of one step, and a fixed part."""
    logits = 2 * sequences * shape.vocabulary * 4
    widest = batched_tokens * (2 * shape.intermediate + 4 * shape.hidden) * _MODEL_VALUE_BYTES
    return logits + widest + _FIXED_WORKING_BYTES


@dataclass(frozen=True)
class Wish:
    """What shall be served on how much memory."""

    memory_bytes: int  # of one GPU
    stored: str
    max_rank: int = 16  # 0: without adapters
    slots: int = 8
    context: int = 8192
    utilization: float = 0.9  # vLLM's --gpu-memory-utilization
    gpus: int = 1  # tensor parallel
    kv_value_bytes: int = _MODEL_VALUE_BYTES
    sequences: int = 256  # vLLM's --max-num-seqs
    batched_tokens: int = 8192  # vLLM's --max-num-batched-tokens


@dataclass(frozen=True)
class Fit:
    """What one GPU then holds. `cache` may be negative: it does not fit."""

    weights: int
    slots: int
    working: int
    cache: int
    tokens: int  # in the KV cache
    sequences: float  # that fit at full length


def fit(shape: Shape, wish: Wish) -> Fit:
    """Weights and cache are divided over the GPUs of one replica; each has a working part of its own."""
    weights = math.ceil(weight_bytes(shape, STORED[wish.stored]) / wish.gpus)
    slots = math.ceil(wish.slots * slot_bytes(shape, wish.max_rank) / wish.gpus) if wish.max_rank else 0
    working = working_bytes(shape, wish.sequences, wish.batched_tokens)
    cache = int(wish.memory_bytes * wish.utilization) - weights - slots - working
    # A GPU holds whole heads: more GPUs than heads repeat them.
    share = math.ceil(shape.kv_heads / wish.gpus) / shape.kv_heads
    of_token = round(token_bytes(shape, wish.kv_value_bytes) * share)
    tokens = cached_tokens(max(cache, 0), of_token)
    return Fit(weights, slots, working, cache, tokens, tokens / wish.context)
