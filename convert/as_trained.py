"""The function as trained, by PEFT's own reading of a checkpoint: the oracle of every measurement."""

from __future__ import annotations

import re
import warnings
from typing import TYPE_CHECKING, Any

from convert.checkpoint import Checkpoint
from convert.errors import CheckpointUnsupported
from convert.formats import EMBEDDING, HEAD, PEFT_PREFIX

if TYPE_CHECKING:
    import torch


def with_adapter(model: Any, checkpoint: Checkpoint) -> Any:
    """`model` with everything the checkpoint trained, in eval mode. Raises CheckpointUnsupported where PEFT can't.

    The settings are adapter_config.json's, the keys PEFT's own, whatever layout they come from.
    """
    from peft import get_peft_model, set_peft_model_state_dict

    _resize(model, checkpoint)
    with warnings.catch_warnings():
        # Of names and settings that have been looked at already.
        warnings.simplefilter("ignore")
        try:
            adapted = get_peft_model(model, _config(checkpoint))
            result = set_peft_model_state_dict(adapted, _state(checkpoint))
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError, re.error) as cause:
            raise CheckpointUnsupported(
                f"{checkpoint.root}: PEFT can't apply its adapter_config.json: {cause}. Save it with save_pretrained."
            ) from cause
    if result.unexpected_keys:
        raise CheckpointUnsupported(
            f"{checkpoint.root}: PEFT finds no place for {', '.join(sorted(result.unexpected_keys)[:3])}: "
            "target_modules of adapter_config.json doesn't fit the weights"
        )
    return adapted.eval()


def _config(checkpoint: Checkpoint) -> Any:
    from dataclasses import fields

    from peft import LoraConfig

    known = {field.name for field in fields(LoraConfig) if field.init}
    settings = {name: value for name, value in checkpoint.settings.items() if name in known}
    return LoraConfig(**settings | {"inference_mode": True})


def _resize(model: Any, checkpoint: Checkpoint) -> None:
    """The vocabulary that the adapter was trained with."""
    saved = checkpoint.contents.saved
    whole = saved.get(EMBEDDING) or saved.get(f"{HEAD}.weight")
    if whole and whole.spec.shape[0] != model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(whole.spec.shape[0], mean_resizing=False)


def _state(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    contents, read = checkpoint.contents, checkpoint.tensors.read
    state: dict[str, torch.Tensor] = {}
    for pair in contents.pairs.values():
        a, b = checkpoint.read(pair)
        state |= {f"{pair.module}.lora_A.weight": a, f"{pair.module}.lora_B.weight": b}
    for pair in contents.embeddings.values():
        state |= {
            f"{pair.module}.lora_embedding_A": read(pair.b.name),
            f"{pair.module}.lora_embedding_B": read(pair.a.name),
        }
    for pair in (*contents.pairs.values(), *contents.embeddings.values()):
        if pair.magnitude:
            state[f"{pair.module}.lora_magnitude_vector"] = read(pair.magnitude.name)
    shared = isinstance(checkpoint.config.get("trainable_token_indices"), list)
    for name, rows in contents.rows.items():
        if shared and name != EMBEDDING:
            continue  # the head's, which PEFT takes from the embedding
        state[f"{name.removesuffix('.weight')}.token_adapter.trainable_tokens_delta"] = read(rows.values.name)
    for name, whole in contents.saved.items():
        state[_place(name, checkpoint, beside=whole.beside)] = read(whole.spec.name)
    return {PEFT_PREFIX + name: tensor for name, tensor in state.items()}


def _place(name: str, checkpoint: Checkpoint, *, beside: bool) -> str:
    """Where PEFT has the base's own weight of a module that it wrapped."""
    module = name.removesuffix(".weight")
    if beside:
        return name
    if name in checkpoint.contents.rows:
        return f"{module}.token_adapter.base_layer.weight"
    adapted = module in checkpoint.contents.pairs or module in checkpoint.contents.embeddings
    return f"{module}.base_layer.weight" if adapted else name
