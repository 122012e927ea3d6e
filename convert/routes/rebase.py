"""Rebase: an adapter moved from the weights that it was trained on to another form of the same base.

The adapter was trained on weights T: for QLoRA the dequantized 4-bit weights. It will be served on weights O: the
full-precision weights, or another 4-bit form. Without a correction the server would compute with O + D, where training
computed with T + D. The rebased adapter has D plus the best low-rank fit of T - O, in plain PEFT files of one rank and
scale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from convert.inputs.base_model import BaseModel
from convert.progress import Progress
from convert.routes.activations import Activations, record_activations
from convert.routes.correction import (
    adapter_shard,
    corrected_layers,
    corrections,
    write_adapter_config,
    write_layer,
)
from convert.routes.trained_adapter import TrainedAdapter
from convert.safetensors_io.shards import ShardWriter

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Rebased:
    """A written adapter for another base.

    `difference` is the root mean square over the layers of |T - O| / |O|. `residual` is the root mean square over the
    layers of the share of T - O that the adapter does not make up for: in outputs where activations were given, else
    in weights.
    """

    directory: Path
    rank: int
    modules: int
    difference: float
    residual: float


def activations_as_trained(trained: TrainedAdapter, rows: Sequence[torch.Tensor], progress: Progress) -> Activations:
    """The inputs of every linear layer while the function as trained reads rows (1, tokens) of token ids.

    Loads the model in float32. Rows that weight the fit must not be those that the result is measured on.
    """
    return record_activations(trained.load().get_base_model(), list(trained.base.linears), rows, progress)


def rebase(
    directory: Path,
    trained: TrainedAdapter,
    onto: BaseModel,
    rank: int,
    progress: Progress,
    activations: Activations | None = None,
) -> Rebased:
    """Write the adapter for `onto` into the empty `directory`: adapter_config.json and adapter_model.safetensors.

    With `activations` of `activations_as_trained` the fit keeps outputs instead of weights, which loses several times
    less. Raises RouteRefused for a rank that can't be served or can't hold the adapter, BaseMismatch where `onto` is
    not the same model.
    """
    layers = corrected_layers(trained, onto, rank)
    differences, residuals = [], []
    with ShardWriter(directory, adapter_shard(layers, rank)) as file:
        for done, correction in enumerate(corrections(trained, onto, layers, rank, activations), start=1):
            write_layer(file, correction.layer, correction.fit.a, correction.fit.b)
            differences.append(correction.difference)
            residuals.append(correction.fit.residual)
            progress("fitting the difference", done, len(layers))
    write_adapter_config(directory, layers, rank, onto.source(trained.checkpoint.base_name))
    return Rebased(directory, rank, len(layers), _root_mean_square(differences), _root_mean_square(residuals))


def _root_mean_square(values: Sequence[float]) -> float:
    return math.sqrt(sum(value * value for value in values) / len(values))
