"""Computes the corrected adapter of `rebase` and `recover`, layer by layer: an adapter for another form of its base.

An adapter was trained on weights T and is to be used on other weights O of the same model. In each layer the corrected
adapter has the adapter's own delta D, plus the best low-rank fit of T - O (`low_rank`). At most two weights of a base
are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from convert.artifact.file_names import ADAPTER_CONFIG, ADAPTER_STEM
from convert.errors import BaseMismatch
from convert.inputs.adapter_checkpoint import Checkpoint, LoraWeights
from convert.inputs.base_model import BaseModel, Linear
from convert.inputs.keys import lora_key
from convert.routes import low_rank
from convert.routes.activations import Activations
from convert.routes.low_rank import LowRankFit
from convert.routes.same_model import require_same_model
from convert.routes.trained_adapter import TrainedAdapter, own_linears
from convert.safetensors_io.shards import Shard, ShardWriter
from convert.safetensors_io.tensors import TensorSpec
from convert.write.adapter import UniformAdapter
from convert.write.files import write_json

if TYPE_CHECKING:
    import torch

# 4-bit forms of one weight differ by some 0.1 of its size, weights of two models by 1 and more.
_MAX_DIFFERENCE = 0.5


@dataclass(frozen=True)
class CorrectedLayer:
    """A linear layer for which the corrected adapter has A and B.

    `lora_weights`: those of the adapter; None for a layer that the adapter leaves alone, and whose weights differ.
    """

    module: str
    out_features: int
    in_features: int
    lora_weights: LoraWeights | None

    def specs(self, rank: int) -> tuple[TensorSpec, TensorSpec]:
        """A and B as written: float32, with the scale in B."""
        return (
            TensorSpec(lora_key(self.module, "A"), "F32", (rank, self.in_features)),
            TensorSpec(lora_key(self.module, "B"), "F32", (self.out_features, rank)),
        )


@dataclass(frozen=True)
class Correction:
    """A and B of one layer. `difference`: size of T - O over the size of O."""

    layer: CorrectedLayer
    fit: LowRankFit
    difference: float


def corrected_layers(trained: TrainedAdapter, onto: BaseModel, rank: int) -> tuple[CorrectedLayer, ...]:
    """Every layer that the adapter changes, and every other layer whose weight in `onto` differs.

    Raises RouteRefused for a rank that can't be served or can't hold the adapter, BaseMismatch where `onto` is not the
    same model.
    """
    checkpoint = trained.checkpoint
    low_rank.require_rank(rank, max(checkpoint.ranks))
    require_same_model(trained.base, onto)
    layers = [
        CorrectedLayer(module, weights.out_features, weights.in_features, weights)
        for module, weights in checkpoint.lora_weights.items()
    ]
    for module, linear in own_linears(trained.base).items():
        if module in checkpoint.lora_weights:
            continue
        if not trained.base_weight(linear).equal(onto.read(onto.linears[module]).float()):
            layers.append(CorrectedLayer(module, linear.out_features, linear.in_features, None))
    return tuple(sorted(layers, key=lambda layer: layer.module))


def corrections(
    trained: TrainedAdapter,
    onto: BaseModel,
    layers: Sequence[CorrectedLayer],
    rank: int,
    activations: Activations | None,
) -> Iterator[Correction]:
    """A and B for `onto` of each layer, one layer at a time.

    With `activations` the fit keeps outputs instead of weights. Raises BaseMismatch at a layer of another model.
    """
    linears = own_linears(trained.base)
    for layer in layers:
        new_weight, difference = _difference(trained, onto, layer, linears.get(layer.module))
        relative = float(difference.norm() / new_weight.norm().clamp_min(1e-30)) if new_weight is not None else 0.0
        if relative > _MAX_DIFFERENCE:
            raise BaseMismatch(
                f"{onto.root} is another model than {trained.base.root}: {layer.module} differs by {relative:.0%} of "
                "its size, where forms of one model differ by a tenth. Give another form of the base of the adapter."
            )
        layer_activations = activations.get(layer.module) if activations else None
        delta = _delta(trained.checkpoint, layer)
        yield Correction(layer, low_rank.fit_beside_delta(difference, delta, rank, layer_activations), relative)


def adapter_shard(layers: Sequence[CorrectedLayer], rank: int) -> Shard:
    """The weight file of the corrected adapter."""
    return Shard(f"{ADAPTER_STEM}.safetensors", tuple(spec for layer in layers for spec in layer.specs(rank)))


def write_layer(file: ShardWriter, layer: CorrectedLayer, a: torch.Tensor, b: torch.Tensor) -> None:
    """Write A and B of one layer into the file of `adapter_shard`."""
    for spec, matrix in zip(layer.specs(len(a)), (a, b), strict=True):
        file.write(spec.name, matrix)


def write_adapter_config(directory: Path, layers: Sequence[CorrectedLayer], rank: int, source: str) -> None:
    """Write adapter_config.json: one rank and scale 1. `source`: the name of the base that it is for."""
    modules = [layer.module for layer in layers]
    write_json(directory / ADAPTER_CONFIG, UniformAdapter(rank, rank, scale_in_b=True).config(modules, source))


def _difference(
    trained: TrainedAdapter, onto: BaseModel, layer: CorrectedLayer, linear: Linear | None
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """O and T - O, both (out, in) in float32. O is None, and T - O is zero, for a tied head.

    A head that is tied to the embedding has no weight of its own: in every form of the model it is the same.
    """
    import torch

    if linear is None:
        return None, torch.zeros(layer.out_features, layer.in_features)
    new_weight = onto.read(onto.linears[layer.module]).float()
    return new_weight, trained.base_weight(linear) - new_weight


def _delta(checkpoint: Checkpoint, layer: CorrectedLayer) -> tuple[torch.Tensor, torch.Tensor, float] | None:
    """A, B and the scale of the adapter's own delta."""
    if layer.lora_weights is None:
        return None
    return *checkpoint.read(layer.lora_weights), layer.lora_weights.scaling
