"""LoRA on a CPU: replaces vLLM's Punica kernels in the worker, so that all tokens of an adapter are computed together.

On a CPU, vLLM 0.32 copies the A and B matrices of an adapter for every token, as 32-bit numbers: a prompt of a thousand
tokens copies each matrix a thousand times. It also takes the index of "no adapter", -1, for the last slot
(https://github.com/vllm-project/vllm/pull/48421). Here the rows of a step are grouped by adapter once, and each group
is one matrix product with A and one with B. vLLM imports this module in its worker, which may be another process.

The names of vLLM that this depends on are in serve.engine.vllm_contract.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import linear
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from serve.engine.worker import Worker

# With fewer rows for each adapter, one batched product of small matrices costs less than a product for each adapter.
_MIN_ROWS_PER_ADAPTER = 4

Rows: TypeAlias = slice | Tensor
# One slot and its rows, or rows and the slot of each.
Group: TypeAlias = tuple[int | Tensor, Rows]


def groups_of(slots: Sequence[int]) -> list[Group]:
    """`slots`: the adapter slot of each row of a step. Rows with slot -1, which means no adapter, are in no group."""
    rows_of_slot: dict[int, list[int]] = {}
    for row, slot in enumerate(slots):
        if slot >= 0:
            rows_of_slot.setdefault(slot, []).append(row)
    all_rows = sorted(row for rows in rows_of_slot.values() for row in rows)
    if len(rows_of_slot) > 1 and len(all_rows) < _MIN_ROWS_PER_ADAPTER * len(rows_of_slot):
        return [(torch.tensor([slots[row] for row in all_rows]), _index(all_rows))]
    return [(slot, _index(rows)) for slot, rows in rows_of_slot.items()]


def _index(rows: Sequence[int]) -> Rows:
    """A slice, which copies nothing, for rows that follow each other."""
    first, end = rows[0], rows[-1] + 1
    return slice(first, end) if end - first == len(rows) else torch.tensor(rows)


def product(x: Tensor, weights: Tensor, slot: int | Tensor) -> Tensor:
    """`x[row] @ weights[slot, 0].T` in the dtype of the weights. x: (rows, in); weights: (slots, 1, out, in), as vLLM
    stacks the A or B matrices of its adapters; result: (rows, out)."""
    x = x.to(weights.dtype)
    if isinstance(slot, int):
        return linear(x, weights[slot, 0])
    return torch.bmm(x.unsqueeze(1), weights[slot, 0].transpose(1, 2)).squeeze(1)


class GroupedAdapters(PunicaWrapperCPU):
    """The Punica wrapper that vLLM's LoRA layers call. Rounds where vLLM does: after each product."""

    _token_groups: Sequence[Group] = ()
    _sampled_groups: Sequence[Group] = ()

    def update_metadata(self, *args: Any, **options: Any) -> None:
        super().update_metadata(*args, **options)
        self._token_groups = groups_of(self.token_lora_indices.tolist())
        self._sampled_groups = groups_of(self.sampler_indices.tolist())

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: Sequence[Tensor],
        lora_b_stacked: Sequence[Tensor],
        scale: float,
        output_slices: Sequence[int],
        **_: Any,
    ) -> None:
        _add_both(self._token_groups, y, x, lora_a_stacked, lora_b_stacked, scale, output_slices)

    def add_lora_embedding(self, y: Tensor, x: Tensor, lora_b_stacked: Tensor, **_: Any) -> None:
        # The embedding that was looked up for a token is already the product with A.
        self._apply_expand(y, x, lora_b_stacked, 0, y.size(-1))

    def add_lora_logits(
        self, y: Tensor, x: Tensor, lora_a_stacked: Tensor, lora_b_stacked: Tensor, scale: float, **_: Any
    ) -> None:
        columns = min(y.size(-1), lora_b_stacked.size(-2))  # either one may be padded
        _add_both(self._sampled_groups, y, x, [lora_a_stacked], [lora_b_stacked[:, :, :columns]], scale, [columns])

    # Fully sharded layers call the products with A and B separately.

    def _apply_shrink(self, y: Tensor, x: Tensor, w_t_all: Tensor, scale: float) -> None:
        for slot, rows in self._token_groups:
            y[rows] = (product(x[rows], w_t_all, slot) * scale).to(y.dtype)

    def _apply_expand(
        self, y: Tensor, x: Tensor, w_t_all: Tensor, y_offset: int, y_slice_size: int, add_inputs: bool = True
    ) -> None:
        out = y[:, y_offset : y_offset + y_slice_size]
        if not add_inputs:
            out.zero_()
        for slot, rows in self._token_groups:
            _add(out, rows, product(x[rows], w_t_all, slot))


def _add_both(
    groups: Sequence[Group],
    y: Tensor,
    x: Tensor,
    a_stacked: Sequence[Tensor],
    b_stacked: Sequence[Tensor],
    scale: float,
    output_slices: Sequence[int],
) -> None:
    """Adds B(A(x)) * scale for layers whose outputs lie side by side in y, `output_slices` columns each."""
    for slot, rows in groups:
        x_of_group, offset = x[rows], 0
        for a, b, columns in zip(a_stacked, b_stacked, output_slices, strict=True):
            shrunk = product(x_of_group, a, slot)
            _add(y[:, offset : offset + columns], rows, product(shrunk if scale == 1 else shrunk * scale, b, slot))
            offset += columns


def _add(y: Tensor, rows: Rows, addend: Tensor) -> None:
    if isinstance(rows, slice):
        y[rows] += addend
    else:
        y.index_add_(0, rows, addend.to(y.dtype))


class CpuWorker(Worker):
    """As on a GPU, and adapters by GroupedAdapters."""

    def group_adapters(self) -> None:
        """Replaces the Punica wrappers of the loaded model. Raises RuntimeError where there is no wrapper, or where
        vLLM's wrapper lacks a method that GroupedAdapters overrides, because vLLM would never call the override."""
        overridden = [name for name, function in vars(GroupedAdapters).items() if callable(function)]
        if missing := [name for name in overridden if not hasattr(PunicaWrapperCPU, name)]:
            raise RuntimeError(f"vLLM's PunicaWrapperCPU has no {', '.join(missing)}, which Graft overrides")
        wrappers = list(self.model_runner.lora_manager._adapter_manager.punica_wrapper_mapping.values())
        if not wrappers:
            raise RuntimeError("vLLM's LoRA manager has no Punica wrapper for Graft to replace")
        for wrapper in wrappers:
            wrapper.__class__ = GroupedAdapters
