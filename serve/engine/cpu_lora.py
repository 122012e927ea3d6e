"""Adapters on a CPU, applied to all the tokens of an adapter at once.

vLLM 0.32 copies both factors of an adapter for every single token there, as 32-bit numbers: a prompt of a thousand
tokens copies each of them a thousand times. It also takes the index of "no adapter", -1, for the last slot
(https://github.com/vllm-project/vllm/pull/48421). Here the rows of a step are grouped by adapter once, and each group
is one matrix product with a factor. Loaded into vLLM's worker, in whichever process that is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import linear
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

# With fewer rows to an adapter, a product of small matrices for each row costs less than one for each adapter.
_FEW_ROWS = 4

Rows: TypeAlias = slice | Tensor
# A slot and its rows, or rows with a slot for each.
Group: TypeAlias = tuple[int | Tensor, Rows]


def groups_of(slots: Sequence[int]) -> list[Group]:
    """`slots`: of each row of a step; -1 is no adapter, and such rows are in no group."""
    rows: dict[int, list[int]] = {}
    for row, slot in enumerate(slots):
        if slot >= 0:
            rows.setdefault(slot, []).append(row)
    several = sorted(row for mine in rows.values() for row in mine)
    if len(rows) > 1 and len(several) < _FEW_ROWS * len(rows):
        return [(torch.tensor([slots[row] for row in several]), _together(several))]
    return [(slot, _together(mine)) for slot, mine in rows.items()]


def _together(rows: Sequence[int]) -> Rows:
    first, end = rows[0], rows[-1] + 1
    return slice(first, end) if end - first == len(rows) else torch.tensor(rows)


def product(x: Tensor, factor: Tensor, slot: int | Tensor) -> Tensor:
    """`x[row] @ factor[slot, 0].T`, in the type of the factor. x: (rows, in); factor: (slots, 1, out, in), as vLLM
    stacks adapters; result: (rows, out)."""
    x = x.to(factor.dtype)
    if isinstance(slot, int):
        return linear(x, factor[slot, 0])
    return torch.bmm(x.unsqueeze(1), factor[slot, 0].transpose(1, 2)).squeeze(1)


class GroupedAdapters(PunicaWrapperCPU):
    """What vLLM's layers call for their adapters. Rounds where vLLM does: after each product."""

    _tokens: Sequence[Group] = ()
    _sampled: Sequence[Group] = ()

    def update_metadata(self, *args: Any, **options: Any) -> None:
        super().update_metadata(*args, **options)
        self._tokens = groups_of(self.token_lora_indices.tolist())
        self._sampled = groups_of(self.sampler_indices.tolist())

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
        _add_both(self._tokens, y, x, lora_a_stacked, lora_b_stacked, scale, output_slices)

    def add_lora_embedding(self, y: Tensor, x: Tensor, lora_b_stacked: Tensor, **_: Any) -> None:
        # What is looked up for a token is its first product already.
        self._apply_expand(y, x, lora_b_stacked, 0, y.size(-1))

    def add_lora_logits(
        self, y: Tensor, x: Tensor, lora_a_stacked: Tensor, lora_b_stacked: Tensor, scale: float, **_: Any
    ) -> None:
        columns = min(y.size(-1), lora_b_stacked.size(-2))  # either may be padded to more of them
        _add_both(self._sampled, y, x, [lora_a_stacked], [lora_b_stacked[:, :, :columns]], scale, [columns])

    # Layers that are sharded fully take the two products apart.

    def _apply_shrink(self, y: Tensor, x: Tensor, w_t_all: Tensor, scale: float) -> None:
        for slot, rows in self._tokens:
            y[rows] = (product(x[rows], w_t_all, slot) * scale).to(y.dtype)

    def _apply_expand(
        self, y: Tensor, x: Tensor, w_t_all: Tensor, y_offset: int, y_slice_size: int, add_inputs: bool = True
    ) -> None:
        out = y[:, y_offset : y_offset + y_slice_size]
        if not add_inputs:
            out.zero_()
        for slot, rows in self._tokens:
            _add(out, rows, product(x[rows], w_t_all, slot))


def _add_both(
    groups: Sequence[Group],
    y: Tensor,
    x: Tensor,
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    scale: float,
    sizes: Sequence[int],
) -> None:
    """Both products, of layers whose outputs of `sizes` columns lie side by side in y."""
    for slot, rows in groups:
        mine, offset = x[rows], 0
        for down, up, columns in zip(downs, ups, sizes, strict=True):
            inner = product(mine, down, slot)
            _add(y[:, offset : offset + columns], rows, product(inner if scale == 1 else inner * scale, up, slot))
            offset += columns


def _add(y: Tensor, rows: Rows, more: Tensor) -> None:
    if isinstance(rows, slice):
        y[rows] += more
    else:
        y.index_add_(0, rows, more.to(y.dtype))


class CpuWorker:
    """What vLLM's worker can do besides: its `worker_extension_cls`."""

    model_runner: Any

    def group_adapters(self) -> None:
        """From now on. Raises AttributeError if vLLM's own wrapper is not as it was: a function of another name would
        be one that nobody calls."""
        for name, function in vars(GroupedAdapters).items():
            if callable(function):
                getattr(PunicaWrapperCPU, name)
        for wrapper in self.model_runner.lora_manager._adapter_manager.punica_wrapper_mapping.values():
            wrapper.__class__ = GroupedAdapters
