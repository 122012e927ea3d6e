"""The function as trained, built by PEFT from the checkpoint: every measurement compares with it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from convert.errors import CheckpointUnsupported
from convert.inputs.adapter_checkpoint import Checkpoint
from convert.inputs.architecture import FAMILIES, Architecture, is_layer_linear
from convert.inputs.base_model import BaseModel
from convert.inputs.keys import PEFT_PREFIX
from convert.inputs.patterns import PatternInvalid, require_quick
from convert.quality.models.float32_model import skeleton
from convert.quantization.format import QuantizationFormat
from convert.safetensors_io.tensors import DTYPES, Tensors

if TYPE_CHECKING:
    import torch


def with_adapter(model: Any, checkpoint: Checkpoint) -> Any:
    """`model` with everything the checkpoint trained, in eval mode. Raises CheckpointUnsupported where PEFT can't.

    The settings come from adapter_config.json. Keys of other layouts are translated to those of PEFT.
    """
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    try:
        require_quick(checkpoint.config, (name for name, _ in model.named_modules()))
    except PatternInvalid as invalid:
        raise CheckpointUnsupported(f"{checkpoint.root}: {invalid}.") from None
    names = FAMILIES[model.config.model_type]
    _resize(model, checkpoint, names)
    with warnings.catch_warnings():
        # PEFT warns of names and settings that Graft has checked already.
        warnings.simplefilter("ignore")
        try:
            adapted = get_peft_model(model, _config(checkpoint))
            state = _state(checkpoint, names)
            result = set_peft_model_state_dict(adapted, state)
            expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        except Exception as cause:  # PEFT does not check its settings: errors of every kind come from their use
            raise CheckpointUnsupported(
                f"{checkpoint.root}: PEFT can't apply its adapter_config.json: {cause}. Save it with save_pretrained."
            ) from cause
    if result.unexpected_keys:
        raise CheckpointUnsupported(
            f"{checkpoint.root}: PEFT finds no place for {', '.join(sorted(result.unexpected_keys)[:3])}: "
            "target_modules of adapter_config.json doesn't fit the weights"
        )
    # A target without LoRA weights keeps B = 0, which changes nothing; anything else was trained and is lost.
    if missing := sorted(name for name in expected.keys() - state.keys() if ".lora_" not in name):
        raise CheckpointUnsupported(
            f"{checkpoint.root}: its adapter_config.json trains {', '.join(missing[:3])}, which the file does not "
            "hold: save it again with PEFT's save_pretrained"
        )
    return adapted.eval()


def require_applicable(checkpoint: Checkpoint, base: BaseModel) -> None:
    """Raises what `load` and `with_adapter` would raise for this pair, without reading a weight."""
    import torch

    shapes = replace(checkpoint, tensors=_Shapes(**vars(checkpoint.tensors)))
    with torch.device("meta"):  # PEFT would make its own weights in memory
        with_adapter(skeleton(base), shapes)


class _Shapes(Tensors):
    """Tensors without values, and without memory for them."""

    def read(self, name: str) -> torch.Tensor:
        import torch

        spec = self.specs[name]
        return torch.empty(spec.shape, dtype=getattr(torch, DTYPES[spec.dtype][1]), device="meta")


def changed_weights(checkpoint: Checkpoint) -> frozenset[str]:
    """The names of the base's weights and biases that the adapter replaces, or changes otherwise than by LoRA in a
    decoder layer: PEFT copies them, or writes to them."""
    state = checkpoint.adapter_state
    outside_layers = [m for m in (*state.lora_weights, *state.embedding_lora_weights) if not is_layer_linear(m)]
    return frozenset([*state.saved_weights, *state.trained_rows, *(f"{module}.weight" for module in outside_layers)])


def base_alone(
    model: Any, checkpoint: Checkpoint, base: BaseModel, quantizer: QuantizationFormat | None
) -> Callable[[], AbstractContextManager[None]]:
    """A context, to be entered as often as needed, in which `model` of `with_adapter` is the base without what was
    trained.

    PEFT switches off what it added. The base's own weights and biases that the checkpoint replaced are put back,
    except those of a resized vocabulary, whose new rows the base does not have.
    """
    parameters, replaced = dict(model.named_parameters(remove_duplicate=False)), {}
    for name, saved in checkpoint.adapter_state.saved_weights.items():
        parameter = parameters.get(PEFT_PREFIX + _base_layer_key(name, checkpoint))
        if parameter is None or saved.is_trained_copy:
            continue
        own = _weight_of_base(name, base, quantizer)
        if own.shape == parameter.shape:
            replaced[id(parameter)] = (parameter, own.float())  # a tied weight has two names

    @contextmanager
    def alone() -> Iterator[None]:
        trained = [(parameter, parameter.data) for parameter, _ in replaced.values()]
        for parameter, own in replaced.values():
            parameter.data = own
        with warnings.catch_warnings():
            # PEFT warns of the biases that are put back here.
            warnings.simplefilter("ignore")
            with model.disable_adapter():
                yield
        for parameter, weight in trained:
            parameter.data = weight

    return alone


def _weight_of_base(name: str, base: BaseModel, quantizer: QuantizationFormat | None) -> torch.Tensor:
    if name == base.architecture.head_weight and base.is_tied:
        name = base.architecture.embedding
    linear = base.linears.get(name.removesuffix(".weight"))
    return base.read_as_trained(linear, quantizer) if linear else base.tensors.read(name)


def _config(checkpoint: Checkpoint) -> Any:
    from dataclasses import fields

    from peft import LoraConfig

    known = {field.name for field in fields(LoraConfig) if field.init}
    settings = {name: value for name, value in checkpoint.peft_settings.items() if name in known}
    settings |= _settings_of_mended_paths(checkpoint)
    # PEFT's own initialisation is B = 0; the checkpoint's may be another, which is not that of its weights.
    return LoraConfig(**settings | {"inference_mode": True, "init_lora_weights": True})


def _settings_of_mended_paths(checkpoint: Checkpoint) -> dict[str, Any]:
    """The settings that name modules, where the adapter was trained on a model in which these have other paths.

    Whatever they matched there is known: these modules, ranks and alphas are named one by one.
    """
    state = checkpoint.adapter_state
    all_weights = (*state.lora_weights.values(), *state.embedding_lora_weights.values())
    if all(weights.trained_path == weights.module for weights in all_weights):
        return {}
    return {
        "target_modules": [weights.module for weights in all_weights],
        "rank_pattern": {f"^{re.escape(weights.module)}": weights.rank for weights in all_weights},
        "alpha_pattern": {f"^{re.escape(weights.module)}": weights.alpha for weights in all_weights},
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }


def _resize(model: Any, checkpoint: Checkpoint, names: Architecture) -> None:
    """Give the model the vocabulary that the adapter was trained with."""
    saved_weights = checkpoint.adapter_state.saved_weights
    saved = saved_weights.get(names.embedding) or saved_weights.get(names.head_weight)
    if saved and saved.spec.shape[0] != model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(saved.spec.shape[0], mean_resizing=False)


def _state(checkpoint: Checkpoint, names: Architecture) -> dict[str, torch.Tensor]:
    adapter_state, read = checkpoint.adapter_state, checkpoint.tensors.read
    state: dict[str, torch.Tensor] = {}
    for module, weights in adapter_state.lora_weights.items():
        a, b = checkpoint.read(weights)
        state |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        if weights.magnitude:
            state[f"{module}.lora_magnitude_vector"] = read(weights.magnitude.name)
    for module, weights in adapter_state.embedding_lora_weights.items():
        state |= {
            f"{module}.lora_embedding_A": read(weights.b.name),
            f"{module}.lora_embedding_B": read(weights.a.name),
        }
    shared = isinstance(checkpoint.config.get("trainable_token_indices"), list)
    for name, rows in adapter_state.trained_rows.items():
        if shared and name != names.embedding:
            _require_rows_of_embedding(name, checkpoint, names.embedding)
            continue
        state[f"{name.removesuffix('.weight')}.token_adapter.trainable_tokens_delta"] = read(rows.values.name)
    for name, saved in adapter_state.saved_weights.items():
        key = name if saved.is_trained_copy else _base_layer_key(name, checkpoint)
        state[key] = read(saved.spec.name)
    return {PEFT_PREFIX + name: tensor for name, tensor in state.items()}


def _require_rows_of_embedding(name: str, checkpoint: Checkpoint, embedding: str) -> None:
    """PEFT takes the rows of a tied head from the embedding, so those in the file must be the same."""
    rows, of_embedding = (checkpoint.adapter_state.trained_rows.get(weight) for weight in (name, embedding))
    tensors = checkpoint.tensors
    if not (rows and of_embedding and tensors.has_bytes_of(rows.values.name, tensors, of_embedding.values.name)):
        raise CheckpointUnsupported(
            f"{checkpoint.root}: its trained rows of {name} are not those of {embedding}, which "
            "trainable_token_indices shares with it: save it again with PEFT's save_pretrained"
        )


def _base_layer_key(name: str, checkpoint: Checkpoint) -> str:
    """PEFT's key of the base's own weight or bias in a module that it may have wrapped."""
    (module, _, part), state = name.rpartition("."), checkpoint.adapter_state
    if name in state.trained_rows:
        return f"{module}.token_adapter.base_layer.{part}"
    adapted = module in state.lora_weights or module in state.embedding_lora_weights
    return f"{module}.base_layer.{part}" if adapted else name
