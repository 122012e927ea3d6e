"""Blocks of rows in which weights are read, computed and written, and the memory for them.

The rows of a block depend on the weight's shape alone, and one thread computes a block: the same input gives the same
bits on any number of cores.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from convert.quantization import nf4
from convert.safetensors_io.tensors import DTYPES

if TYPE_CHECKING:
    import torch

_BLOCK_WEIGHTS = 1 << 20
BUFFER_BYTES = 4 * _BLOCK_WEIGHTS


def rows_per_block(shape: tuple[int, int]) -> int:
    """The rows of a block: at least one, and always so many that the last NF4 group ends at the end of a row."""
    columns = max(shape[1], 1)
    aligned_rows = nf4.BLOCK // math.gcd(columns, nf4.BLOCK)
    return max(_BLOCK_WEIGHTS // columns // aligned_rows, 1) * aligned_rows


class Buffers:
    """A pool of buffers. They are reused: the first access to new memory takes as long as the arithmetic on it."""

    def __init__(self) -> None:
        self._free: list[torch.Tensor] = []

    def acquire(self, nbytes: int) -> torch.Tensor:
        import torch

        if nbytes > BUFFER_BYTES:  # one row of a very wide matrix
            return torch.empty(nbytes, dtype=torch.uint8)
        try:
            return self._free.pop()
        except IndexError:
            return torch.empty(BUFFER_BYTES, dtype=torch.uint8)

    def release(self, buffer: torch.Tensor) -> None:
        if buffer.numel() == BUFFER_BYTES:
            self._free.append(buffer)


@dataclass(frozen=True)
class Block:
    """Some rows of a weight, from `first_row` on: the first `nbytes` of a buffer."""

    buffer: torch.Tensor
    nbytes: int
    first_row: int = 0

    @property
    def bytes(self) -> memoryview:
        return memoryview(self.buffer[: self.nbytes].numpy())

    def matrix(self, dtype: str, columns: int) -> torch.Tensor:
        """The bytes as a matrix of this type (rows, columns), without a copy."""
        import torch

        size, name = DTYPES[dtype]
        rows = self.nbytes // (size * columns) if columns else 0
        return self.buffer.view(getattr(torch, name)).as_strided((rows, columns), (columns, 1))


class _Scratch(threading.local):
    """Memory for one block in float32. Each thread has its own."""

    memory: torch.Tensor | None = None

    def matrix(self, rows: int, columns: int) -> torch.Tensor:
        import torch

        if self.memory is None or self.memory.numel() < rows * columns:
            self.memory = torch.empty(max(rows * columns, _BLOCK_WEIGHTS))
        return self.memory.as_strided((rows, columns), (columns, 1))


SCRATCH = _Scratch()
