"""Weights on their way from the base to the output, a block of rows at a time.

    reading thread       the stored bytes of some rows, into a buffer
    computing threads    to float32, the delta added, rounded once into the same buffer; a block each
    the caller           writes the buffer, hashes it, and gives it back

Memory is a few blocks, however large a weight is. Rows of a block are a function of the weight's shape alone and each
block is computed by one thread: the same input gives the same bits on any number of cores. How often threads wait for
Python's lock decides how fast this is, so few calls are made for a block.
"""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from convert import lora, nf4
from convert.ahead import ahead
from convert.base_model import BaseModel, Linear
from convert.errors import BaseMismatch
from convert.nf4 import Nf4
from convert.reader import TensorReader
from convert.tensors import DTYPES, TensorSpec, all_finite

if TYPE_CHECKING:
    import torch

_BLOCK_WEIGHTS = 1 << 20
_BUFFER_BYTES = 4 * _BLOCK_WEIGHTS
_AHEAD = 2
_COMPUTING = min(4, os.cpu_count() or 1)


class Buffers:
    """Memory that is used again: touching fresh pages takes as long as the arithmetic that is done in them."""

    def __init__(self) -> None:
        self._free: list[torch.Tensor] = []

    def take(self, nbytes: int) -> torch.Tensor:
        import torch

        if nbytes > _BUFFER_BYTES:  # a single row of an uncommonly wide matrix
            return torch.empty(nbytes, dtype=torch.uint8)
        try:
            return self._free.pop()
        except IndexError:
            return torch.empty(_BUFFER_BYTES, dtype=torch.uint8)

    def give(self, buffer: torch.Tensor) -> None:
        if buffer.numel() == _BUFFER_BYTES:
            self._free.append(buffer)


@dataclass(frozen=True)
class Block:
    """The first `nbytes` of a buffer: rows of a weight from `row` on."""

    buffer: torch.Tensor
    nbytes: int
    row: int = 0

    @property
    def bytes(self) -> memoryview:
        return memoryview(self.buffer[: self.nbytes].numpy())

    def matrix(self, dtype: str, columns: int) -> torch.Tensor:
        import torch

        size, name = DTYPES[dtype]
        rows = self.nbytes // (size * columns) if columns else 0
        return self.buffer.view(getattr(torch, name)).as_strided((rows, columns), (columns, 1))


class Work(Protocol):
    """One step of a plan, in the two halves that run side by side."""

    def reads(self, reader: TensorReader, buffers: Buffers) -> Iterator[Block | None]:
        """What `made` is then called with, in this order; at least one item."""
        ...

    def made(self, block: Block | None) -> Iterator[tuple[str, Block]]:
        """Bytes for the output, by the name of the tensor they continue."""
        ...


def blocks(works: Iterable[Work], reader: TensorReader, buffers: Buffers) -> Generator[tuple[int, str, Block]]:
    """The number of the work, the name of a tensor and its next bytes. Whoever wrote them gives the buffer back."""
    return ahead(_made(ahead(_read(works, reader, buffers), _AHEAD)), _AHEAD)


def _read(works: Iterable[Work], reader: TensorReader, buffers: Buffers) -> Generator[tuple[int, Work, Block | None]]:
    for number, work in enumerate(works):
        for block in work.reads(reader, buffers):
            yield number, work, block


def _made(read: Generator[tuple[int, Work, Block | None]]) -> Generator[tuple[int, str, Block]]:
    import torch

    threads = torch.get_num_threads()
    pending: deque[Future[list[tuple[int, str, Block]]]] = deque()
    try:
        with ThreadPoolExecutor(_COMPUTING) as computing:
            for number, work, block in read:
                if block is None:  # a whole weight, which all threads share: nothing else is computed meanwhile
                    while pending:
                        yield from pending.popleft().result()
                    torch.set_num_threads(threads)
                    yield from ((number, *result) for result in work.made(None))
                    continue
                pending.append(computing.submit(_made_alone, number, work, block))
                if len(pending) > _COMPUTING:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
    finally:
        torch.set_num_threads(threads)
        read.close()


def _made_alone(number: int, work: Work, block: Block) -> list[tuple[int, str, Block]]:
    """By this thread only: a block is too small to be shared out, and how a product is shared out may change its last
    bit."""
    import torch

    torch.set_num_threads(1)
    return [(number, *result) for result in work.made(block)]


@dataclass(frozen=True)
class CopiedBytes:
    """A tensor that stays as it is."""

    spec: TensorSpec

    def reads(self, reader: TensorReader, buffers: Buffers) -> Iterator[Block | None]:
        for start in range(0, self.spec.nbytes, _BUFFER_BYTES):
            block = Block(buffers.take(_BUFFER_BYTES), min(_BUFFER_BYTES, self.spec.nbytes - start))
            reader.read_into(block.bytes, self.spec.name, start)
            yield block

    def made(self, block: Block | None) -> Iterator[tuple[str, Block]]:
        assert block
        yield self.spec.name, block


@dataclass(frozen=True)
class WholeTensors:
    """Tensors that are computed from a whole weight, which `make` reads itself."""

    make: Callable[[], Iterator[tuple[str, torch.Tensor]]]

    def reads(self, reader: TensorReader, buffers: Buffers) -> Iterator[Block | None]:
        yield None

    def made(self, block: Block | None) -> Iterator[tuple[str, Block]]:
        import torch

        for name, tensor in self.make():
            flat = tensor.contiguous().reshape(-1).view(torch.uint8)
            yield name, Block(flat, flat.numel())


class _Scratch(threading.local):
    """Memory for a block in float32, for each thread."""

    memory: torch.Tensor | None = None

    def matrix(self, rows: int, columns: int) -> torch.Tensor:
        import torch

        if self.memory is None or self.memory.numel() < rows * columns:
            self.memory = torch.empty(max(rows * columns, _BLOCK_WEIGHTS))
        return self.memory.as_strided((rows, columns), (columns, 1))


_scratch = _Scratch()


class Source(Protocol):
    """A matrix of weights as it is stored, to be read in rows."""

    name: str
    shape: tuple[int, int]

    @property
    def row_bytes(self) -> float: ...

    def open(self) -> None:
        """Read what all rows need."""
        ...

    def float32(self, block: Block) -> torch.Tensor:
        """The rows of a block (rows, columns), in memory that the thread's next call may use again."""
        ...


class FloatSource:
    """Floats of any size; a tensor of another rank than two counts as rows of its last dimension."""

    def __init__(self, spec: TensorSpec) -> None:
        self.name = spec.name
        columns = spec.shape[-1] if spec.shape else 1
        self.shape = (math.prod(spec.shape[:-1]), columns)
        self.row_bytes = columns * DTYPES[spec.dtype][0]
        self._dtype = spec.dtype

    def open(self) -> None:
        """Nothing: a row stands for itself."""

    def float32(self, block: Block) -> torch.Tensor:
        stored = block.matrix(self._dtype, self.shape[1])
        return _scratch.matrix(*stored.shape).copy_(stored)


class Nf4Source:
    """NF4 by bitsandbytes: two weights in a byte, one scale for a run of weights that may span rows."""

    def __init__(self, base: BaseModel, linear: Linear, settings: Nf4) -> None:
        self.name = linear.weight
        self.shape = linear.shape
        self.row_bytes = linear.in_features / 2
        self._base, self._linear, self._settings = base, linear, settings
        self._scales: torch.Tensor | None = None

    def open(self) -> None:
        stored = (spec.name for spec in self._base.stored(self._linear) if spec.name != self.name)
        parts = {name: self._base.tensors.read(name) for name in stored}
        self._scales = self._settings.scales(self._linear.module, parts)

    def float32(self, block: Block) -> torch.Tensor:
        assert self._scales is not None, "opened before"
        columns = self.shape[1]
        rows = min(rows_of_block(self.shape), self.shape[0] - block.row)
        first, count = block.row * columns // nf4.BLOCK, math.ceil(rows * columns / nf4.BLOCK)
        codes = block.buffer[: block.nbytes].view(-1, 1)
        return self._settings.dequantize_block(codes, self._scales[first : first + count], (rows, columns))


Delta = tuple["torch.Tensor", "torch.Tensor", float]


class MergedRows:
    """A matrix brought to another type of float, a delta (A, B, scale) added in float32 before, if there is one.

    Raises BaseMismatch where the result is not finite.
    """

    def __init__(self, source: Source, out: TensorSpec, delta: Callable[[], Delta] | None) -> None:
        self._source, self._out, self._read_delta = source, out, delta
        self._delta: Delta | None = None

    def reads(self, reader: TensorReader, buffers: Buffers) -> Iterator[Block | None]:
        self._source.open()
        if self._read_delta:
            a, b, scale = self._read_delta()
            self._delta = a.float(), b.float(), scale
        rows, columns = self._source.shape
        step = rows_of_block(self._source.shape)
        for row in range(0, rows, step):
            count = min(step, rows - row)
            stored = math.ceil(count * self._source.row_bytes)
            buffer = buffers.take(max(stored, count * columns * DTYPES[self._out.dtype][0]))
            reader.read_into(Block(buffer, stored).bytes, self._source.name, int(row * self._source.row_bytes))
            yield Block(buffer, stored, row)

    def made(self, block: Block | None) -> Iterator[tuple[str, Block]]:
        assert block
        weight = self._source.float32(block)
        if self._delta:
            a, b, scale = self._delta
            weight = lora.add_delta(weight, a, b[block.row : block.row + len(weight)], scale)
        result = Block(block.buffer, weight.numel() * DTYPES[self._out.dtype][0])
        rounded = result.matrix(self._out.dtype, self._source.shape[1])
        require_finite(self._out.name, weight, rounded.dtype)
        rounded.copy_(weight)
        yield self._out.name, result


def rows_of_block(shape: tuple[int, int]) -> int:
    """At least one, and so many that a block begins where a run of weights with one NF4 scale does."""
    columns = max(shape[1], 1)
    whole = nf4.BLOCK // math.gcd(columns, nf4.BLOCK)
    return max(_BLOCK_WEIGHTS // columns // whole, 1) * whole


def require_finite(name: str, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> None:
    """Raises BaseMismatch unless every element is finite, also after rounding to `dtype`."""
    if not all_finite(tensor, dtype):
        raise BaseMismatch(
            f"{name}: weights are not finite in {dtype or tensor.dtype}: the base is broken, or its weights or their "
            "sum with the delta are too large for this type; --dtype bfloat16 holds larger ones."
        )
