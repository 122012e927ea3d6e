"""Writes the separate adapter in a form that every engine reads alike: with one rank and one scale.

Not every engine, and not every version of vLLM, reads rank_pattern and alpha_pattern: one that does not scales each
module by the one lora_alpha / r of adapter_config.json, without a word. Where the modules of a checkpoint have several
scales, each module's scale is multiplied into its B; where they have several ranks, A and B are filled up with zeros.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.artifact.file_names import ADAPTER_CONFIG, ADAPTER_STEM
from convert.inputs import lora
from convert.inputs.adapter_checkpoint import Checkpoint, LoraWeights
from convert.inputs.keys import lora_key
from convert.progress import Progress
from convert.safetensors_io.shards import Shard, ShardWriter
from convert.safetensors_io.tensors import TensorSpec
from convert.write.files import write_json


@dataclass(frozen=True)
class UniformAdapter:
    """The rank and the alpha of every module. `scale_in_b`: each module's scale is multiplied into its B."""

    rank: int
    alpha: int
    scale_in_b: bool

    @classmethod
    def of(cls, lora_weights: Mapping[str, LoraWeights]) -> UniformAdapter:
        """Weights stay unchanged if all modules have one rank, and one scale that an integer alpha gives."""
        rank = max(weights.rank for weights in lora_weights.values())
        alphas = {round(weights.scaling * weights.rank, 9) for weights in lora_weights.values()}
        alpha = alphas.pop()
        if alphas or alpha != int(alpha) or any(weights.rank != rank for weights in lora_weights.values()):
            return cls(rank, rank, scale_in_b=True)
        return cls(rank, int(alpha), scale_in_b=False)

    @property
    def note(self) -> str:
        """A sentence where the weights were changed; empty where they stay as they are."""
        if not self.scale_in_b:
            return ""
        return (
            f"The modules differ in rank or scale: A and B of each are padded with zeros to rank {self.rank}, and its "
            "scale is multiplied into B."
        )

    def specs(self, weights: LoraWeights) -> tuple[TensorSpec, TensorSpec]:
        """A and B as written. Changed ones are float32, since bfloat16 would round a scale like 1/sqrt(3)."""
        a, b = lora_key(weights.module, "A"), lora_key(weights.module, "B")
        if not self.scale_in_b:
            return TensorSpec(a, weights.a.dtype, weights.a.shape), TensorSpec(b, weights.b.dtype, weights.b.shape)
        return (
            TensorSpec(a, "F32", (self.rank, weights.in_features)),
            TensorSpec(b, "F32", (weights.out_features, self.rank)),
        )

    def config(self, modules: Iterable[str], source: str) -> dict[str, Any]:
        """adapter_config.json, without the settings that only training needs."""
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
            "target_modules": _targets(sorted(modules)),
            "task_type": "CAUSAL_LM",
            "use_dora": False,
            "use_rslora": False,
        }


def _targets(modules: Sequence[str]) -> list[str]:
    """Last names of the modules; whole paths in a multimodal model, whose vision tower has layers of such names too."""
    if any(module.startswith("model.language_model.") for module in modules):
        return list(modules)
    return sorted({module.rpartition(".")[2] for module in modules})


def write_adapter(directory: Path, checkpoint: Checkpoint, source: str, progress: Progress) -> UniformAdapter:
    """adapter_config.json and adapter_model.safetensors. Returns what was written."""
    adapter, lora_weights = UniformAdapter.of(checkpoint.lora_weights), checkpoint.lora_weights
    specs = tuple(spec for weights in lora_weights.values() for spec in adapter.specs(weights))
    with ShardWriter(directory, Shard(f"{ADAPTER_STEM}.safetensors", specs)) as file:
        for done, weights in enumerate(lora_weights.values(), start=1):
            for name, tensor in _tensors(adapter, checkpoint, weights):
                file.write(name, tensor)
            progress("writing adapter", done, len(lora_weights))
    write_json(directory / ADAPTER_CONFIG, adapter.config(lora_weights, source))
    return adapter


def _tensors(adapter: UniformAdapter, checkpoint: Checkpoint, weights: LoraWeights) -> Iterator[tuple[str, Any]]:
    a, b = checkpoint.read(weights)
    if adapter.scale_in_b:
        a, b = lora.padded(a.float(), b.float() * weights.scaling, adapter.rank)
    names = (spec.name for spec in adapter.specs(weights))
    return zip(names, (a, b), strict=True)
