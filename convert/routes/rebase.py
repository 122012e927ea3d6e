"""Rebase: an adapter moved from the weights it was trained on to another form of the same base.

Trained on T (for QLoRA the dequantized 4-bit weights), served on O (the full-precision weights, another 4-bit form),
an adapter as it is makes O + D where training made T + D. The rebased adapter has D + the best low-rank fit of T - O
(`lowrank`), in plain PEFT files of one rank and scale. Layer by layer; two weights of the base in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert import lowrank
from convert.as_trained import with_adapter
from convert.base_model import BaseModel, Linear
from convert.checkpoint import Checkpoint, LoraPair
from convert.errors import BaseMismatch
from convert.formats import ADAPTER_CONFIG, ADAPTER_STEM, EMBEDDING, LoraKey
from convert.lowrank import Fit, Inputs
from convert.nf4 import Nf4
from convert.progress import Progress
from convert.quality import load
from convert.routes.adapter import NormalAdapter
from convert.shards import Shard, ShardWriter
from convert.tensors import TensorSpec
from convert.writer import write_json

if TYPE_CHECKING:
    import torch

# 4-bit forms of one weight differ by some 0.1 of its size, weights of two models by 1 and more.
_MOST_DIFFERENCE = 0.5
# Norms are never quantized; some quantizers (AWQ, SmoothQuant) move scales from them into the weights behind.
_MOST_NORM_DIFFERENCE = 0.01


@dataclass(frozen=True)
class Target:
    """A linear layer that the rebased adapter has a pair for; `pair` is the adapter's own, where it has one."""

    module: str
    out_features: int
    in_features: int
    pair: LoraPair | None

    def specs(self, rank: int) -> tuple[TensorSpec, TensorSpec]:
        """A and B as written: float32, with the scale in B."""
        return (
            TensorSpec(str(LoraKey(self.module, "A")), "F32", (rank, self.in_features)),
            TensorSpec(str(LoraKey(self.module, "B")), "F32", (self.out_features, rank)),
        )


@dataclass(frozen=True)
class Correction:
    """What one layer's pair became. `difference`: size of T - O over the size of O."""

    target: Target
    fit: Fit
    difference: float


@dataclass(frozen=True)
class Rebased:
    """A written adapter for another base.

    `difference` is the root mean square over layers of |T - O| / |O|; `residual` that of the share of it, in outputs
    where inputs were given and else in weights, that the adapter doesn't make up for.
    """

    directory: Path
    rank: int
    modules: int
    difference: float
    residual: float


def inputs_as_trained(
    checkpoint: Checkpoint,
    base: BaseModel,
    quantizer: Nf4 | None,
    rows: Sequence[torch.Tensor],
    progress: Progress,
) -> Inputs:
    """What every linear layer reads in the function as trained, going over rows (1, tokens) of token ids.

    Loads the model in float32. Rows that weigh the fit must not be those it is measured on.
    """
    model = with_adapter(load(base, quantizer), checkpoint)
    return lowrank.record_inputs(model.get_base_model(), list(base.linears), rows, progress)


def rebase(
    directory: Path,
    checkpoint: Checkpoint,
    base: BaseModel,
    quantizer: Nf4 | None,
    onto: BaseModel,
    rank: int,
    progress: Progress,
    inputs: Inputs | None = None,
) -> Rebased:
    """Write the adapter for `onto` into the empty `directory`: adapter_config.json and adapter_model.safetensors.

    `base` and `quantizer` (None for LoRA) say what it was trained on. With `inputs` of `inputs_as_trained` the fit
    keeps outputs instead of weights, which loses several times less. Raises RouteRefused for a rank that can't be
    served or can't hold the adapter, BaseMismatch where `onto` is not the same model.
    """
    found = targets(checkpoint, base, quantizer, onto, rank)
    specs = tuple(spec for target in found for spec in target.specs(rank))
    corrections = []
    with ShardWriter(directory, Shard(f"{ADAPTER_STEM}.safetensors", specs)) as file:
        for done, correction in enumerate(corrected(checkpoint, base, quantizer, onto, rank, found, inputs), start=1):
            halves = (correction.fit.a, correction.fit.b)
            for spec, half in zip(correction.target.specs(rank), halves, strict=True):
                file.write(spec.name, half)
            corrections.append((correction.difference, correction.fit.residual))
            progress("fitting the difference", done, len(found))
    write_json(directory / ADAPTER_CONFIG, adapter_config(found, rank, onto.source(checkpoint.base_name)))
    differences, residuals = zip(*corrections, strict=True)
    return Rebased(directory, rank, len(found), _root_mean_square(differences), _root_mean_square(residuals))


def targets(
    checkpoint: Checkpoint, base: BaseModel, quantizer: Nf4 | None, onto: BaseModel, rank: int
) -> tuple[Target, ...]:
    """Every layer that the adapter changes or that differs. Raises RouteRefused and BaseMismatch as `rebase`."""
    lowrank.require_rank(rank, max(checkpoint.ranks))
    require_same(base, onto)
    found = [Target(pair.module, pair.out_features, pair.in_features, pair) for pair in checkpoint.pairs.values()]
    for module, linear in base.linears.items():
        if module not in checkpoint.pairs and _corrigible(base, linear) and _differs(base, quantizer, onto, linear):
            found.append(Target(module, linear.out_features, linear.in_features, None))
    return tuple(sorted(found, key=lambda target: target.module))


def corrected(
    checkpoint: Checkpoint,
    base: BaseModel,
    quantizer: Nf4 | None,
    onto: BaseModel,
    rank: int,
    found: Sequence[Target],
    inputs: Inputs | None,
) -> Iterator[Correction]:
    """The pairs of the rebased adapter, one at a time. Raises BaseMismatch at a layer of another model."""
    for target in found:
        weight, difference = _difference(base, quantizer, onto, target)
        relative = float(difference.norm() / weight.norm().clamp_min(1e-30)) if weight is not None else 0.0
        if relative > _MOST_DIFFERENCE:
            raise BaseMismatch(
                f"{onto.root} is another model than {base.root}: {target.module} differs by {relative:.0%} of its "
                "size, where forms of one model differ by a tenth. Give another form of the base of the adapter."
            )
        seen = inputs.get(target.module) if inputs else None
        yield Correction(target, lowrank.corrected(difference, _delta(checkpoint, target), rank, seen), relative)


def adapter_config(found: Sequence[Target], rank: int, source: str) -> dict[str, Any]:
    """adapter_config.json of a rebased adapter: one rank, scale 1."""
    modules: Any = {target.module: target.pair for target in found}
    return NormalAdapter(rank, rank, folded=True).config(modules, source)


def require_same(base: BaseModel, onto: BaseModel) -> None:
    """Raises BaseMismatch unless `onto` has the layers, the vocabulary and the norms of `base`."""
    ours = {module: linear.shape for module, linear in base.linears.items() if _corrigible(base, linear)}
    theirs = {module: linear.shape for module, linear in onto.linears.items() if _corrigible(onto, linear)}
    problems = [f"{module} is {theirs.get(module, 'missing')}" for module in ours if theirs.get(module) != ours[module]]
    problems += [f"{module} is not in the base" for module in theirs.keys() - ours.keys()]
    if base.tensors.specs[EMBEDDING].shape != onto.tensors.specs[EMBEDDING].shape:
        problems.append(f"{EMBEDDING} is {onto.tensors.specs[EMBEDDING].shape}")
    problems = problems or list(_norm_problems(base, onto))
    if problems:
        listed = "".join(f"\n  - {problem}" for problem in problems[:5])
        raise BaseMismatch(f"{onto.root} is no form of the same model as {base.root}:{listed}")


def _norm_problems(base: BaseModel, onto: BaseModel) -> Iterator[str]:
    for spec in base.others:
        if spec.name == EMBEDDING or spec.name.endswith("inv_freq"):
            continue
        if spec.name not in onto.tensors or onto.tensors.specs[spec.name].shape != spec.shape:
            yield f"{spec.name} is missing, or of another shape"
            continue
        ours, theirs = base.tensors.read(spec.name).float(), onto.tensors.read(spec.name).float()
        if float((ours - theirs).norm()) > _MOST_NORM_DIFFERENCE * float(ours.norm()):
            yield (
                f"{spec.name} has other values: its quantizer moved scales between layers (AWQ and SmoothQuant do), "
                "so that single weights can't be compared. Quantize the base without that"
            )


def _corrigible(model: BaseModel, linear: Linear) -> bool:
    """A tied head may be stored a second time: it is the embedding, which every form has as it is."""
    return not (linear.is_head and model.is_tied)


def _differs(base: BaseModel, quantizer: Nf4 | None, onto: BaseModel, linear: Linear) -> bool:
    return not base.read_as_trained(linear, quantizer).equal(onto.read(onto.linears[linear.module]).float())


def _difference(
    base: BaseModel, quantizer: Nf4 | None, onto: BaseModel, target: Target
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """O (None: a tied head, which has no form of its own) and T - O, both (out, in) in float32."""
    import torch

    linear = base.linears.get(target.module)
    if linear is None or not _corrigible(base, linear):
        return None, torch.zeros(target.out_features, target.in_features)
    weight = onto.read(onto.linears[target.module]).float()
    return weight, base.read_as_trained(linear, quantizer) - weight


def _delta(checkpoint: Checkpoint, target: Target) -> tuple[torch.Tensor, torch.Tensor, float] | None:
    if target.pair is None:
        return None
    return *checkpoint.read(target.pair), target.pair.scaling


def _root_mean_square(values: Sequence[float]) -> float:
    return math.sqrt(sum(value * value for value in values) / len(values))
