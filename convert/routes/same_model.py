"""Checks that two base models are forms of one model, so that the difference of their weights is meaningful."""

from __future__ import annotations

from collections.abc import Iterator

from convert.errors import BaseMismatch
from convert.inputs.base_model import BaseModel
from convert.routes.trained_adapter import own_linears

# Norms are never quantized; some quantizers (AWQ, SmoothQuant) move scales from them into the next weights.
_MAX_NORM_DIFFERENCE = 0.01


def require_same_model(base: BaseModel, onto: BaseModel) -> None:
    """Raises BaseMismatch unless `onto` has the layers, the vocabulary and the norms of `base`."""
    problems = list(_shape_problems(base, onto)) or list(_norm_problems(base, onto))
    if problems:
        listed = "".join(f"\n  - {problem}" for problem in problems[:5])
        raise BaseMismatch(f"{onto.root} is not a form of the same model as {base.root}:{listed}")


def _shape_problems(base: BaseModel, onto: BaseModel) -> Iterator[str]:
    base_shapes = {module: linear.shape for module, linear in own_linears(base).items()}
    onto_shapes = {module: linear.shape for module, linear in own_linears(onto).items()}
    for module, shape in base_shapes.items():
        if onto_shapes.get(module) != shape:
            yield f"{module} is {onto_shapes.get(module, 'missing')}"
    for module in onto_shapes.keys() - base_shapes.keys():
        yield f"{module} is not in the base"
    if base.embedding.shape != onto.embedding.shape:
        yield f"{onto.embedding.name} is {onto.embedding.shape}"


def _norm_problems(base: BaseModel, onto: BaseModel) -> Iterator[str]:
    for spec in base.language_specs:
        if spec == base.embedding or spec.name.endswith("inv_freq"):
            continue
        if spec.name not in onto.tensors or onto.tensors.specs[spec.name].shape != spec.shape:
            yield f"{spec.name} is missing, or of another shape"
            continue
        base_values, onto_values = base.tensors.read(spec.name).float(), onto.tensors.read(spec.name).float()
        if float((base_values - onto_values).norm()) > _MAX_NORM_DIFFERENCE * float(base_values.norm()):
            yield (
                f"{spec.name} has other values: its quantizer moved scales between layers (AWQ and SmoothQuant do), "
                "so that single weights can't be compared. Quantize the base without that"
            )
