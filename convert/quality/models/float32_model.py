"""A model in float32, made by transformers: with every weight in memory, or without memory for weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from convert.errors import BaseUnreadable
from convert.inputs.base_model import BaseModel
from convert.inputs.model_config import TEXT_CONFIG, with_language_settings
from convert.quantization.format import QuantizationFormat

if TYPE_CHECKING:
    import torch


def load(base: BaseModel, quantizer: QuantizationFormat | None) -> Any:
    """The model with the weights that an adapter was trained against: those of `base`, quantized and dequantized.

    Without a quantizer the stored weights are used. Raises BaseUnreadable where configuration and weights don't fit.
    """
    import torch

    model = _empty_model(base)
    expected = model.state_dict()
    with torch.no_grad():
        for name, weight in _named_weights(base, quantizer):
            if _has_place(expected, name, tuple(weight.shape)):
                expected[name].copy_(weight)
    _require_filled(base, expected)
    return model.eval()


def skeleton(base: BaseModel) -> Any:
    """The model of `load` with the names and shapes of its weights, but no memory for them. Raises as `load`.

    Its buffers, which no file holds, have their values.
    """
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = _empty_model(base)
    expected = model.state_dict()
    for name, shape in weight_shapes(base).items():
        _has_place(expected, name, shape)
    _require_filled(base, expected)
    return model.eval()


def _empty_model(base: BaseModel) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.initialization import no_init_weights

    others = base.architecture.other_parts
    factory = AutoModelForImageTextToText if others else AutoModelForCausalLM
    try:
        config = AutoConfig.for_model(**_float_config(base.config))
        with no_init_weights():
            model = factory.from_config(config, dtype=torch.float32, attn_implementation="eager")
    except Exception as cause:  # the model's own code raises errors of many kinds for sizes that don't fit
        raise BaseUnreadable(f"{base.root}: transformers makes no model of its config.json: {cause}") from cause
    for part in others:
        model.set_submodule(part, torch.nn.Module())  # text alone never runs it
    model.tie_weights()
    return model


def weight_shapes(base: BaseModel) -> dict[str, tuple[int, ...]]:
    """The shape of every weight of the model that its files hold, by its name; they may hold others too."""
    linears = [linear for linear in base.linears.values() if not (linear.is_head and base.is_tied)]
    return {spec.name: spec.shape for spec in base.language_specs} | {linear.weight: linear.shape for linear in linears}


def _float_config(config: Mapping[str, Any]) -> dict[str, Any]:
    left_out = ("quantization_config", "auto_map")
    nested_dtypes = {"dtype": None, "torch_dtype": None} if TEXT_CONFIG in config else {}
    kept = {name: value for name, value in config.items() if name not in left_out}
    return with_language_settings(kept, nested_dtypes) if nested_dtypes else kept


def _named_weights(base: BaseModel, quantizer: QuantizationFormat | None) -> Iterator[tuple[str, torch.Tensor]]:
    for spec in base.language_specs:
        yield spec.name, base.tensors.read(spec.name)
    for linear in base.linears.values():
        if linear.is_head and base.is_tied:
            continue  # some files store the embedding a second time as the head; the model uses the embedding
        yield linear.weight, base.read_as_trained(linear, quantizer)


def _has_place(expected: Mapping[str, torch.Tensor], name: str, shape: tuple[int, ...]) -> bool:
    """False where the model has no such weight, such as an old inv_freq buffer. Raises BaseUnreadable for its shape."""
    if name not in expected:
        return False
    if tuple(expected[name].shape) != shape:
        raise BaseUnreadable(f"{name} is {list(shape)}, its config says {list(expected[name].shape)}")
    return True


def _require_filled(base: BaseModel, expected: Mapping[str, torch.Tensor]) -> None:
    tied = {base.architecture.head_weight} if base.is_tied else set()
    if missing := expected.keys() - weight_shapes(base).keys() - tied:
        raise BaseUnreadable(f"{base.root} lacks what its config needs: {', '.join(sorted(missing)[:3])}")


def causal_lm(model: Any) -> Any:
    """The transformers model inside PEFT's wrapper, with the adapter's layers in it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
