"""Models in float32, filled weight by weight, whatever form the weights are stored in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.base_model import BaseModel
from convert.errors import BaseUnreadable
from convert.formats import HEAD
from convert.scheme import Scheme

if TYPE_CHECKING:
    import torch


def load(base: BaseModel, quantizer: Scheme | None) -> Any:
    """The model with the weights an adapter was trained against: those of `base` after `quantizer` and back.

    None: as they are stored. Raises BaseUnreadable where the configuration and the weights make no model.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    try:
        config = AutoConfig.for_model(**_plain(base.config))
        with no_init_weights():
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    except (ValueError, KeyError, TypeError) as cause:
        raise BaseUnreadable(f"{base.root}: transformers makes no model of its config.json: {cause}") from cause
    model.tie_weights()
    expected = model.state_dict()
    with torch.no_grad():
        filled = {name for name, weight in _weights(base, quantizer) if _fill(expected, name, weight)}
    tied = {f"{HEAD}.weight"} if base.is_tied else set()
    if missing := expected.keys() - filled - tied:
        raise BaseUnreadable(f"{base.root} lacks what its config needs: {', '.join(sorted(missing)[:3])}")
    return model.eval()


def load_written(model: Path, adapter: Path | None) -> Any:
    """What was written, read back: the model, with the written adapter beside it if it has one."""
    loaded = load(BaseModel.open(model), None)
    if adapter is None:
        return loaded
    from peft import PeftModel

    return PeftModel.from_pretrained(loaded, str(adapter)).eval()


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in ("quantization_config", "auto_map")}


def _weights(base: BaseModel, quantizer: Scheme | None) -> Iterator[tuple[str, torch.Tensor]]:
    for spec in base.others:
        yield spec.name, base.tensors.read(spec.name)
    for linear in base.linears.values():
        if linear.is_head and base.is_tied:
            continue  # some files store it a second time; the embedding is what counts
        yield linear.weight, base.read_as_trained(linear, quantizer)


def _fill(expected: Mapping[str, torch.Tensor], name: str, weight: torch.Tensor) -> bool:
    """False for what the model doesn't hold as a weight, such as an old inv_freq buffer."""
    if name not in expected:
        return False
    if expected[name].shape != weight.shape:
        raise BaseUnreadable(f"{name} is {list(weight.shape)}, its config says {list(expected[name].shape)}")
    expected[name].copy_(weight)
    return True
