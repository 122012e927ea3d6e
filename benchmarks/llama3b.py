"""Writes a model of Llama-3.2-3B's shape with random weights, its NF4 form, and an adapter.

All layers share the same random weights: the measurements don't depend on values, and one random matrix of each shape
takes seconds where 3.2 billion random weights would take minutes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from convert.artifact.file_names import ADAPTER_CONFIG, ADAPTER_STEM, MODEL_STEM
from convert.inputs.architecture import FAMILIES
from convert.inputs.keys import lora_key
from convert.quantization.nf4 import Nf4
from convert.safetensors_io.shards import Shard, ShardWriter, index, split
from convert.safetensors_io.tensors import TensorSpec

HIDDEN, LAYERS, INTERMEDIATE, VOCABULARY = 3072, 28, 8192, 128_256
HEADS, KEY_HEADS, HEAD_DIM = 24, 8, 128
EMBEDDING = FAMILIES["llama"].embedding
RANK = 16
SHARD_BYTES = 4_960_000_000  # two files, as on the Hugging Face Hub
LINEARS = {
    "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
    "self_attn.k_proj": (KEY_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.v_proj": (KEY_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
NORMS = ("input_layernorm", "post_attention_layernorm")
_EMBEDDING_CHUNK_ROWS = 2048

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_HEADS,
    "head_dim": HEAD_DIM,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": True,
    "max_position_embeddings": 131_072,
    "rope_theta": 500_000.0,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 128_000,
    "eos_token_id": [128_001, 128_008, 128_009],
    "dtype": "bfloat16",
}
_PEFT = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "example/llama-3b-shape",
    "r": RANK,
    "lora_alpha": 2 * RANK,
    "lora_dropout": 0.0,
    "bias": "none",
    "target_modules": sorted({name.rpartition(".")[2] for name in LINEARS}),
    "inference_mode": True,
    "init_lora_weights": True,
}


def save_base(directory: Path, tokenizer: Path, quantizer: Nf4 | None = None) -> Path:
    """Write the model in bfloat16, with a quantizer its linear layers in NF4; copy the tokenizer from `tokenizer`."""
    directory.mkdir(parents=True)
    torch.manual_seed(3)
    weights = {shape: _random(shape) for shape in dict.fromkeys(LINEARS.values())}
    groups: list[tuple[TensorSpec, ...]] = [(TensorSpec(EMBEDDING, "BF16", (VOCABULARY, HIDDEN)),)]
    groups += [(TensorSpec(name, "BF16", (HIDDEN,)),) for name in _norms()]
    for module, shape in modules():
        unquantized = (TensorSpec(f"{module}.weight", "BF16", shape),)
        groups.append(quantizer.specs(module, shape) if quantizer else unquantized)
    shards = split(groups, MODEL_STEM, SHARD_BYTES)
    stored = {shape: quantizer.quantize("", weight) for shape, weight in weights.items()} if quantizer else {}
    for shard in shards:
        with ShardWriter(directory, shard) as file:
            _fill(file, {spec.name for spec in shard.specs}, weights, stored)
    if len(shards) > 1:
        _write(directory / f"{MODEL_STEM}.safetensors.index.json", index(shards))
    _write(directory / "config.json", CONFIG | ({"quantization_config": quantizer.config()} if quantizer else {}))
    for path in (*tokenizer.glob("token*"), *tokenizer.glob("chat_template*")):
        shutil.copy(path, directory)
    return directory


def save_adapter(directory: Path) -> Path:
    """Write a LoRA of rank 16 on every linear layer in float32, in PEFT's format."""
    directory.mkdir(parents=True)
    torch.manual_seed(5)
    tensors = {}
    for module, (rows, columns) in modules():
        tensors[lora_key(module, "A")] = torch.randn(RANK, columns) / columns**0.5
        tensors[lora_key(module, "B")] = 0.02 * torch.randn(rows, RANK)
    specs = tuple(TensorSpec(name, "F32", tuple(tensor.shape)) for name, tensor in tensors.items())
    with ShardWriter(directory, Shard(f"{ADAPTER_STEM}.safetensors", specs)) as file:
        for name, tensor in tensors.items():
            file.write(name, tensor)
    _write(directory / ADAPTER_CONFIG, _PEFT)
    return directory


def modules() -> Iterator[tuple[str, tuple[int, int]]]:
    for layer in range(LAYERS):
        for name, shape in LINEARS.items():
            yield f"model.layers.{layer}.{name}", shape


def _norms() -> list[str]:
    return ["model.norm.weight", *(f"model.layers.{n}.{norm}.weight" for n in range(LAYERS) for norm in NORMS)]


def _fill(
    file: ShardWriter,
    names: set[str],
    weights: dict[tuple[int, int], torch.Tensor],
    stored: dict[tuple[int, int], dict[str, torch.Tensor]],
) -> None:
    if EMBEDDING in names:
        for row in range(0, VOCABULARY, _EMBEDDING_CHUNK_ROWS):
            rows = _random((min(_EMBEDDING_CHUNK_ROWS, VOCABULARY - row), HIDDEN))
            file.append(EMBEDDING, memoryview(rows.view(torch.uint8).reshape(-1).numpy()))
    for name in names.intersection(_norms()):
        file.write(name, torch.ones(HIDDEN, dtype=torch.bfloat16))
    for module, shape in modules():
        for part, tensor in stored[shape].items() if stored else ((".weight", weights[shape]),):
            if f"{module}{part}" in names:
                file.write(f"{module}{part}", tensor)


def _random(shape: tuple[int, int]) -> torch.Tensor:
    return (0.02 * torch.randn(shape)).to(torch.bfloat16)


def _write(path: Path, document: object) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n")
