"""Weights of the base model, to be read in blocks of rows and brought to float32."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

from convert.inputs.base_model import BaseModel, Linear
from convert.quantization import nf4
from convert.quantization.nf4 import Nf4
from convert.safetensors_io.tensors import DTYPES, TensorSpec
from convert.write.blocks import SCRATCH, Block, rows_per_block

if TYPE_CHECKING:
    import torch


class RowSource(Protocol):
    """A stored matrix of weights. `row_bytes`: stored bytes of one row, a fraction where rows share a byte."""

    name: str
    shape: tuple[int, int]

    @property
    def row_bytes(self) -> float: ...

    def open(self) -> None:
        """Read what every row needs. Called once, before `float32`."""
        ...

    def float32(self, block: Block) -> torch.Tensor:
        """The rows of a block (rows, columns), in memory that the same thread's next call may reuse."""
        ...


class FloatRows:
    """A tensor of floats. A tensor that is no matrix counts as rows of its last dimension."""

    def __init__(self, spec: TensorSpec) -> None:
        self.name = spec.name
        columns = spec.shape[-1] if spec.shape else 1
        self.shape = (math.prod(spec.shape[:-1]), columns)
        self.row_bytes = columns * DTYPES[spec.dtype][0]
        self._dtype = spec.dtype

    def open(self) -> None:
        """Reads nothing, since a row needs only its own bytes."""

    def float32(self, block: Block) -> torch.Tensor:
        stored = block.matrix(self._dtype, self.shape[1])
        return SCRATCH.matrix(*stored.shape).copy_(stored)


class Nf4Rows:
    """NF4 by bitsandbytes: two weights in a byte, one scale for 64 weights, which may belong to two rows."""

    def __init__(self, base: BaseModel, linear: Linear, nf4_format: Nf4) -> None:
        self.name = linear.weight
        self.shape = linear.shape
        self.row_bytes = linear.in_features / 2
        self._base, self._linear, self._format = base, linear, nf4_format
        self._scales: torch.Tensor | None = None

    def open(self) -> None:
        names = (spec.name for spec in self._base.stored_specs(self._linear) if spec.name != self.name)
        parts = {name: self._base.tensors.read(name) for name in names}
        self._scales = self._format.scales(self._linear.module, parts)

    def float32(self, block: Block) -> torch.Tensor:
        assert self._scales is not None, "opened before"
        columns = self.shape[1]
        rows = min(rows_per_block(self.shape), self.shape[0] - block.first_row)
        first, count = block.first_row * columns // nf4.BLOCK, math.ceil(rows * columns / nf4.BLOCK)
        codes = block.buffer[: block.nbytes].view(-1, 1)
        return self._format.dequantize_block(codes, self._scales[first : first + count], (rows, columns))
