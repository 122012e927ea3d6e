"""A model in float32 of which a part is in memory: the decoder layer that runs, some rows of embedding and head.

transformers' own modules compute everything, and PEFT's inside them. The decoder's forward runs over each row with its
layers left out, twice: first it says what it gives each layer (masks, positions), which depends on the family, and then
what it makes of the last layer's output. In between, each layer is read, all rows go through it, and it is freed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from convert.inputs.base_model import BaseModel
from convert.progress import Progress
from convert.quality.models.float32_model import causal_lm, skeleton, weight_shapes
from convert.quality.models.layer_weights import LayerWeights, ReadWeight, placeholder, weights_as_trained
from convert.quality.models.output_layers import logits_of
from convert.quality.models.vocabulary import (
    head_weight_name,
    multiply_by_blocks,
    positions_at_once,
    read_rows_of_tokens,
)

if TYPE_CHECKING:
    import torch

# Rows of this many tokens go through a layer together: 100 MB of hidden states at a width of 3072.
GROUP_TOKENS = 8192

Variant = Callable[[], AbstractContextManager[None]]
"""A context in which the model is another one, with the same weights in its layers: the base without its adapter."""


class StreamedModel:
    """`model`: that of transformers, or PEFT's. What needs all of its weights at once doesn't work with it.

    Call its methods in torch's inference mode.
    """

    def __init__(
        self,
        base: BaseModel,
        read: ReadWeight | None = None,
        *,
        adapt: Callable[[Any], Any] = lambda model: model,
        held: frozenset[str] = frozenset(),
    ) -> None:
        """`read`: the weights of the linear layers, those that are stored without it. `adapt` puts an adapter on.

        `held`: the names of weights that are in memory from the beginning, because the adapter changes them.
        """
        self._base = base
        self._read = read or weights_as_trained(base, None, read_again=False)
        model = skeleton(base)
        in_layers, vocabulary_held = self._streamed(held)
        model.load_state_dict(self._first_weights(in_layers, vocabulary_held), strict=False, assign=True)
        model.tie_weights()
        self._layers: Sequence[Any] = model.get_submodule(base.architecture.layers)
        self._weights = self._layer_weights(model, in_layers)
        self.model = adapt(model.eval())
        if not vocabulary_held:
            plain = causal_lm(self.model)
            embedding = plain.get_input_embeddings()
            read_rows_of_tokens(base, embedding, embedding.weight)
            multiply_by_blocks(base, plain.get_output_embeddings())

    def hidden_states(
        self, rows: Sequence[torch.Tensor], variants: Sequence[Variant], model_name: str, progress: Progress
    ) -> Iterator[tuple[Sequence[torch.Tensor], list[torch.Tensor]]]:
        """Groups of the rows of token ids (1, tokens), in their order, and for each variant the group's states.

        The states (positions, width) are those that predict the next tokens: tokens - 1 of each row, one row after the
        other. Each layer is read once for a group. `model_name` is for the progress.
        """
        groups = list(_groups(rows))
        steps = len(groups) * len(self._layers)
        for done, group in enumerate(groups):
            passes = [self._begin(group, variant) for variant in variants]
            for number, layer in enumerate(self._layers):
                progress(f"measuring {model_name}", done * len(self._layers) + number, steps)
                with self._weights.loaded(number):
                    for variant, rows_in_layers in zip(variants, passes, strict=True):
                        with variant():
                            for row in rows_in_layers:
                                row.run(layer, number)
            yield group, [self._end(*each) for each in zip(passes, variants, strict=True)]
        progress(f"measuring {model_name}", steps, steps)

    def log_probs(self, states: torch.Tensor, variant: Variant = nullcontext) -> Iterator[torch.Tensor]:
        """Log-probabilities of the next token after each state, in blocks of (`positions_at_once`, vocabulary)."""
        plain = causal_lm(self.model)
        for block in states.split(positions_at_once(plain.config.get_text_config().vocab_size)):
            with variant():
                logits = logits_of(plain, block)
            yield logits.log_softmax(-1)

    def token_losses(
        self, states: torch.Tensor, next_ids: torch.Tensor, variant: Variant = nullcontext
    ) -> torch.Tensor:
        """The loss in nats of the token that comes after each state (positions)."""
        import torch

        of_blocks, start = [], 0
        for log_probs in self.log_probs(states, variant):
            ids = next_ids[start : start + len(log_probs), None]
            of_blocks.append(-log_probs.gather(1, ids)[:, 0])
            start += len(log_probs)
        return torch.cat(of_blocks)

    def generate(self, **settings: Any) -> torch.Tensor:
        """`generate` of transformers. Every token reads every layer, unless the layers are small enough to stay."""
        with self._weights.on_demand(self._layers):
            generated: torch.Tensor = self.model.generate(**settings)
        return generated

    def release(self) -> None:
        """Free the layers that stayed in memory because they are small."""
        self._weights.release()

    def _streamed(self, held: frozenset[str]) -> tuple[dict[str, int], bool]:
        """The layer of each linear layer that is read when it runs, by module; whether embedding and head are held."""
        architecture = self._base.architecture
        in_layers = {
            linear.module: layer
            for linear in self._base.linears.values()
            if linear.weight not in held and (layer := architecture.layer_of(linear.module)) is not None
        }
        return in_layers, is_vocabulary_held(self._base, held)

    def _first_weights(self, in_layers: dict[str, int], vocabulary_held: bool) -> dict[str, torch.Tensor]:
        import torch

        base = self._base
        weights: dict[str, torch.Tensor] = {}
        for name, shape in weight_shapes(base).items():
            linear = base.linears.get(name.removesuffix(".weight"))
            if linear and linear.module in in_layers:
                weights[name] = placeholder(shape)
            elif not vocabulary_held and name == base.architecture.embedding:
                weights[name] = torch.empty(shape)  # a page of it takes memory once a row is written there
            elif not vocabulary_held and name == head_weight_name(base):
                weights[name] = placeholder(shape)
            elif linear and linear.is_head:
                weights[name] = base.read(linear).float()
            else:
                weights[name] = self._read(linear) if linear else base.tensors.read(name).float()
        return weights

    def _layer_weights(self, model: Any, in_layers: dict[str, int]) -> LayerWeights:
        layers: list[list[tuple[Any, Any]]] = [[] for _ in self._layers]
        for module, layer in in_layers.items():
            layers[layer].append((model.get_submodule(module).weight, self._base.linears[module]))
        return LayerWeights(layers, self._read)

    def _begin(self, rows: Sequence[torch.Tensor], variant: Variant) -> list[_RowInLayers]:
        with variant():
            return [self._first_layer_inputs(ids) for ids in rows]

    def _first_layer_inputs(self, ids: torch.Tensor) -> _RowInLayers:
        row = _RowInLayers(ids)
        with _replaced(self._layers, row.record):
            self._decode(ids)
        return row

    def _end(self, rows: Sequence[_RowInLayers], variant: Variant) -> torch.Tensor:
        import torch

        states = []
        with variant():
            for row in rows:
                with _replaced(self._layers, row.last_output):
                    states.append(self._decode(row.ids)[:-1])
        return torch.cat(states)

    def _decode(self, ids: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = causal_lm(self.model).get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0]
        return states


def is_vocabulary_held(base: BaseModel, held: frozenset[str]) -> bool:
    """Whether embedding and head are in memory whole: an adapter changes one of them, or the head is quantized."""
    architecture = base.architecture
    head = None if base.is_tied else base.linears[architecture.head]
    is_quantized = head is not None and head.quantization_format is not None
    return is_quantized or not held.isdisjoint({architecture.embedding, architecture.head_weight})


@dataclass
class _RowInLayers:
    """A row of token ids on its way through the layers: its states before the next one, and how each is called."""

    ids: torch.Tensor
    states: Any = None
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)

    def record(self, number: int, states: torch.Tensor, *arguments: Any, **settings: Any) -> torch.Tensor:
        """In the place of a layer's forward."""
        if number == 0:
            self.states = states
        self.calls.append((arguments, settings))
        return states

    def run(self, layer: Any, number: int) -> None:
        arguments, settings = self.calls[number]
        self.states = layer(self.states, *arguments, **settings)

    def last_output(self, _: int, *arguments: Any, **settings: Any) -> torch.Tensor:
        """In the place of a layer's forward."""
        states: torch.Tensor = self.states
        return states


@contextmanager
def _replaced(layers: Sequence[Any], forward: Callable[..., torch.Tensor]) -> Iterator[None]:
    for number, layer in enumerate(layers):
        layer.forward = partial(forward, number)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # of the instance; that of its class is seen again


def _groups(rows: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    group: list[torch.Tensor] = []
    tokens = 0
    for row in rows:
        if group and tokens + row.shape[1] > GROUP_TOKENS:
            yield group
            group, tokens = [], 0
        group.append(row)
        tokens += row.shape[1]
    if group:
        yield group
