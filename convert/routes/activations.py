"""Records the input activations of linear layers, which weight the low-rank fit (`low_rank`)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from convert.progress import Progress

if TYPE_CHECKING:
    import torch

# Activations of this many tokens are kept, 16 bits a number: 2 GB for a model of 3 billion weights.
MAX_TOKENS = 2048

Activations = Mapping[str, "torch.Tensor"]
"""Module -> its input activations (tokens, in), bfloat16. Modules with the same input share one tensor."""


class ActivationRecorder:
    """While its context is open, keeps the inputs of each module of a model, for at most MAX_TOKENS tokens."""

    def __init__(self, model: Any, modules: Collection[str]) -> None:
        self._model = model
        self._modules = modules
        self._chunks: dict[str, list[torch.Tensor]] = {}
        # Module -> the module under which the chunks of the input that both share are kept.
        self._owners: dict[str, str] = {}
        self._last_input: torch.Tensor | None = None
        self._last_owner = ""
        self._hooks: list[Any] = []

    def __enter__(self) -> Self:
        for module in self._modules:
            hook = self._model.get_submodule(module).register_forward_pre_hook(partial(self._record, module))
            self._hooks.append(hook)
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._last_input = None

    @property
    def tokens(self) -> int:
        return max(map(_token_count, self._chunks.values()), default=0)

    def activations(self) -> Activations:
        """Everything that was recorded."""
        import torch

        joined = {module: torch.cat(chunks) for module, chunks in self._chunks.items()}
        return {module: joined[owner] for module, owner in self._owners.items()}

    def _record(self, module: str, _: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        if self._last_input is inputs[0]:  # the query, key and value projections run one after another on one input
            self._owners[module] = self._last_owner
            return
        self._last_input, self._last_owner = inputs[0], module
        self._owners[module] = module
        chunks = self._chunks.setdefault(module, [])
        left = MAX_TOKENS - _token_count(chunks)
        if left > 0:
            rows = inputs[0].detach().reshape(-1, inputs[0].shape[-1])
            chunks.append(rows[:left].bfloat16().cpu())


def record_activations(
    model: Any, modules: Collection[str], rows: Sequence[torch.Tensor], progress: Progress
) -> Activations:
    """The inputs of each module while the model reads rows (1, tokens), until MAX_TOKENS are recorded."""
    import torch

    with ActivationRecorder(model, modules) as recorder, torch.inference_mode():
        for done, row in enumerate(rows):
            if recorder.tokens >= MAX_TOKENS:
                break
            progress("reading the layers' inputs", done, len(rows))
            model(row, use_cache=False, logits_to_keep=1)
    progress("reading the layers' inputs", len(rows), len(rows))
    return recorder.activations()


def _token_count(chunks: Sequence[torch.Tensor]) -> int:
    return sum(map(len, chunks))
