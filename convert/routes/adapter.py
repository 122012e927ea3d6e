"""The separate adapter, normalised: what PEFT and vLLM both read, and read alike.

vLLM scales every module by the one lora_alpha / r of adapter_config.json and drops rank_pattern and alpha_pattern
without a word. So the output has one rank and one scale: where the checkpoint has several, the scale of each module
goes into its B and ranks are filled up with zeros.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert import lora
from convert.checkpoint import Checkpoint, LoraPair
from convert.formats import ADAPTER_CONFIG, ADAPTER_STEM, LoraKey
from convert.progress import Progress
from convert.shards import Shard, ShardWriter
from convert.tensors import TensorSpec
from convert.writer import write_json


@dataclass(frozen=True)
class NormalAdapter:
    """Rank and alpha that hold for every module; `folded` when the weights must change for that."""

    rank: int
    alpha: int
    folded: bool

    @classmethod
    def of(cls, pairs: Mapping[str, LoraPair]) -> NormalAdapter:
        """Weights stay as they are where one rank and one whole-numbered alpha already say the scale."""
        rank = max(pair.rank for pair in pairs.values())
        alphas = {round(pair.scaling * pair.rank, 9) for pair in pairs.values()}
        alpha = alphas.pop()
        if alphas or alpha != int(alpha) or any(pair.rank != rank for pair in pairs.values()):
            return cls(rank, rank, folded=True)
        return cls(rank, int(alpha), folded=False)

    def specs(self, pair: LoraPair) -> tuple[TensorSpec, TensorSpec]:
        """A and B as written. Folded ones are float32: a scale like 1/sqrt(3) has no place in bfloat16."""
        a, b = str(LoraKey(pair.module, "A")), str(LoraKey(pair.module, "B"))
        if not self.folded:
            return TensorSpec(a, pair.a.dtype, pair.a.shape), TensorSpec(b, pair.b.dtype, pair.b.shape)
        return (
            TensorSpec(a, "F32", (self.rank, pair.in_features)),
            TensorSpec(b, "F32", (pair.out_features, self.rank)),
        )

    def config(self, pairs: Mapping[str, LoraPair], source: str) -> dict[str, Any]:
        """adapter_config.json, with nothing in it that only training needed."""
        return {
            "alpha_pattern": {},
            "base_model_name_or_path": source,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "lora_alpha": self.alpha,
            "lora_dropout": 0.0,
            "modules_to_save": None,
            "peft_type": "LORA",
            "r": self.rank,
            "rank_pattern": {},
            "target_modules": sorted({module.rpartition(".")[2] for module in pairs}),
            "task_type": "CAUSAL_LM",
            "use_dora": False,
            "use_rslora": False,
        }


def write_adapter(directory: Path, checkpoint: Checkpoint, source: str, progress: Progress) -> NormalAdapter:
    """adapter_config.json and adapter_model.safetensors. Returns what was written."""
    normal = NormalAdapter.of(checkpoint.pairs)
    specs = tuple(spec for pair in checkpoint.pairs.values() for spec in normal.specs(pair))
    with ShardWriter(directory, Shard(f"{ADAPTER_STEM}.safetensors", specs)) as file:
        for done, pair in enumerate(checkpoint.pairs.values(), start=1):
            for name, tensor in _halves(normal, checkpoint, pair):
                file.write(name, tensor)
            progress("writing adapter", done, len(checkpoint.pairs))
    write_json(directory / ADAPTER_CONFIG, normal.config(checkpoint.pairs, source))
    return normal


def _halves(normal: NormalAdapter, checkpoint: Checkpoint, pair: LoraPair) -> Iterator[tuple[str, Any]]:
    a, b = checkpoint.read(pair)
    if normal.folded:
        a, b = lora.padded(a.float(), b.float() * pair.scaling, normal.rank)
    names = (spec.name for spec in normal.specs(pair))
    return zip(names, (a, b), strict=True)
