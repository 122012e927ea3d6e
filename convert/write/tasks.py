"""Tasks that compute output tensors, block by block or from a whole weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from convert.errors import BaseUnreadable, FormatRefused
from convert.inputs import lora
from convert.safetensors_io.reader import TensorReader
from convert.safetensors_io.tensors import DTYPES, TensorSpec, all_finite
from convert.write.blocks import BUFFER_BYTES, Block, Buffers, rows_per_block
from convert.write.row_sources import RowSource

if TYPE_CHECKING:
    import torch

Delta = tuple["torch.Tensor", "torch.Tensor", float]
"""A, B and the factor of B·A."""


class TensorTask(Protocol):
    """The work of one step of a plan. `read` and `compute` run in different threads."""

    def read(self, reader: TensorReader, buffers: Buffers) -> Iterator[Block | None]:
        """The blocks to compute, in order. None instead of a block: `compute` reads the whole weight itself."""
        ...

    def compute(self, block: Block | None) -> Iterator[tuple[str, Block]]:
        """The name of an output tensor and its next bytes."""
        ...


@dataclass(frozen=True)
class CopyTask:
    """Copies the stored bytes of a tensor."""

    spec: TensorSpec

    def read(self, reader: TensorReader, buffers: Buffers) -> Iterator[Block | None]:
        for start in range(0, self.spec.nbytes, BUFFER_BYTES):
            block = Block(buffers.acquire(BUFFER_BYTES), min(BUFFER_BYTES, self.spec.nbytes - start))
            reader.read_into(block.bytes, self.spec.name, start)
            yield block

    def compute(self, block: Block | None) -> Iterator[tuple[str, Block]]:
        assert block
        yield self.spec.name, block


@dataclass(frozen=True)
class WholeWeightTask:
    """Computes output tensors from a whole weight, which `tensors` reads itself."""

    tensors: Callable[[], Iterator[tuple[str, torch.Tensor]]]

    def read(self, reader: TensorReader, buffers: Buffers) -> Iterator[Block | None]:
        yield None

    def compute(self, block: Block | None) -> Iterator[tuple[str, Block]]:
        import torch

        for name, tensor in self.tensors():
            flat = tensor.contiguous().reshape(-1).view(torch.uint8)
            yield name, Block(flat, flat.numel())


class MergeTask:
    """Adds a delta, if there is one, to a matrix in float32, and casts the sum to the type of `output`.

    Raises as `require_finite`.
    """

    def __init__(self, source: RowSource, output: TensorSpec, read_delta: Callable[[], Delta] | None) -> None:
        self._source, self._output, self._read_delta = source, output, read_delta
        self._delta: Delta | None = None

    def read(self, reader: TensorReader, buffers: Buffers) -> Iterator[Block | None]:
        self._source.open()
        if self._read_delta:
            a, b, scaling = self._read_delta()
            self._delta = a.float(), b.float(), scaling
        rows, columns = self._source.shape
        step = rows_per_block(self._source.shape)
        for row in range(0, rows, step):
            count = min(step, rows - row)
            stored_bytes = math.ceil(count * self._source.row_bytes)
            buffer = buffers.acquire(max(stored_bytes, count * columns * DTYPES[self._output.dtype][0]))
            block = Block(buffer, stored_bytes, row)
            reader.read_into(block.bytes, self._source.name, int(row * self._source.row_bytes))
            yield block

    def compute(self, block: Block | None) -> Iterator[tuple[str, Block]]:
        assert block
        weight = self._source.float32(block)
        if self._delta:
            a, b, scaling = self._delta
            weight = lora.add_delta(weight, a, b[block.first_row : block.first_row + len(weight)], scaling)
        result = Block(block.buffer, weight.numel() * DTYPES[self._output.dtype][0])
        rounded = result.matrix(self._output.dtype, self._source.shape[1])
        require_finite(self._output.name, weight, rounded.dtype)
        rounded.copy_(weight)
        yield self._output.name, result


def require_finite(name: str, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> None:
    """Raises BaseUnreadable where an element is NaN or infinite, FormatRefused where one is too large for `dtype`."""
    if all_finite(tensor, dtype):
        return
    if all_finite(tensor):
        raise FormatRefused(
            f"{name}: the sum of base and delta is too large for {dtype}. --dtype bfloat16 holds larger weights."
        )
    raise BaseUnreadable(f"{name} holds NaN or infinity in the base. Copy the base again, from an undamaged copy.")
