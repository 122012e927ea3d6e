"""A model in float32, loaded weight by weight from any storage format, and run over token ids.

The output layers run separately from the decoder, in blocks: the logits of a long row would take a gigabyte.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.errors import BaseUnreadable
from convert.inputs.base_model import BaseModel
from convert.progress import Progress
from convert.quality.output_layers import logits_of
from convert.quantization.format import QuantizationFormat

if TYPE_CHECKING:
    import torch


# Positions whose distributions are in memory at once: 33 MB in float32 at a vocabulary of 128k.
BLOCK = 64


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
    """The model of `load` with the names and shapes of its weights, but no memory for them. Raises as `load`."""
    import torch

    with torch.device("meta"):
        model = _empty_model(base)
    expected = model.state_dict()
    for name, shape in _shapes(base).items():
        _has_place(expected, name, shape)
    _require_filled(base, expected)
    return model.eval()


def load_written(model: Path, adapter: Path | None) -> Any:
    """The written model, read back, with the written adapter if there is one."""
    loaded = load(BaseModel.open(model), None)
    if adapter is None:
        return loaded
    from peft import PeftModel

    return PeftModel.from_pretrained(loaded, str(adapter)).eval()


def hidden_states(
    model: Any, rows: Sequence[torch.Tensor], model_name: str, progress: Progress
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Each row of token ids (1, tokens) with the hidden states (tokens - 1, width) that predict its next tokens."""
    decoder = causal_lm(model).get_decoder()
    for done, row in enumerate(rows):
        progress(f"measuring {model_name}", done, len(rows))
        yield row, decoder(input_ids=row, use_cache=False).last_hidden_state[0, :-1]
    progress(f"measuring {model_name}", len(rows), len(rows))


def log_probs(model: Any, states: torch.Tensor) -> Iterator[torch.Tensor]:
    """Log-probabilities of the next token after each state, in blocks of (at most BLOCK, vocabulary)."""
    for block in states.split(BLOCK):
        yield logits_of(causal_lm(model), block).log_softmax(-1)


def token_log_probs(blocks: Iterable[torch.Tensor], row: torch.Tensor) -> torch.Tensor:
    """The log-probability of each token of the row but the first, from the row's distributions: (tokens - 1)."""
    import torch

    next_ids = row[0, 1:].split(BLOCK)
    return torch.cat([block.gather(1, ids[:, None])[:, 0] for block, ids in zip(blocks, next_ids, strict=True)])


@contextmanager
def merged_head(model: Any) -> Iterator[torch.Tensor]:
    """The head's weight, with its adapter merged into it while the context lasts, where there is one."""
    head = causal_lm(model).get_output_embeddings()
    if not hasattr(head, "merge"):
        yield head.weight
        return
    head.merge()
    try:
        yield head.weight
    finally:
        head.unmerge()  # a tied embedding has the same weight, and the base alone must not see the delta


def _empty_model(base: BaseModel) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    try:
        config = AutoConfig.for_model(**_float_config(base.config))
        with no_init_weights():
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    except Exception as cause:  # the model's own code raises errors of many kinds for sizes that don't fit
        raise BaseUnreadable(f"{base.root}: transformers makes no model of its config.json: {cause}") from cause
    model.tie_weights()
    return model


def _shapes(base: BaseModel) -> dict[str, tuple[int, ...]]:
    """The shape of every weight of `_named_weights`, by its name."""
    linears = [linear for linear in base.linears.values() if not (linear.is_head and base.is_tied)]
    return {spec.name: spec.shape for spec in base.other_specs} | {linear.weight: linear.shape for linear in linears}


def _float_config(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in ("quantization_config", "auto_map")}


def _named_weights(base: BaseModel, quantizer: QuantizationFormat | None) -> Iterator[tuple[str, torch.Tensor]]:
    for spec in base.other_specs:
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
    if missing := expected.keys() - _shapes(base).keys() - tied:
        raise BaseUnreadable(f"{base.root} lacks what its config needs: {', '.join(sorted(missing)[:3])}")


def causal_lm(model: Any) -> Any:
    """The transformers model inside PEFT's wrapper, with the adapter's layers in it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
