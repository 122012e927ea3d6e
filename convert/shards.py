"""Safetensors files written as a stream: the header first, from what is planned, then tensor after tensor.

The order inside a file is that of the safetensors library (large element types first, then by name), which keeps
every tensor aligned to its type. Tensors may arrive in any order: each has its place. A file whose tensors arrive in
its own order is hashed while it is written, any other is read once more.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from convert.digests import FileDigest
from convert.tensors import DTYPES, TensorSpec

if TYPE_CHECKING:
    import torch

# Also what a killed conversion has to make again, at most.
SHARD_BYTES = 1_000_000_000

_WRITEBACK_BYTES = 32 << 20


@dataclass(frozen=True)
class Shard:
    """One file and what it will hold."""

    file: str
    specs: tuple[TensorSpec, ...]


def split(groups: Iterable[Sequence[TensorSpec]], stem: str, limit_bytes: int = SHARD_BYTES) -> tuple[Shard, ...]:
    """Fill files in order up to the limit; a group (the parts of one weight) is never torn apart."""
    bins: list[list[TensorSpec]] = [[]]
    filled = 0
    for group in groups:
        size = sum(spec.nbytes for spec in group)
        if bins[-1] and filled + size > limit_bytes:
            bins.append([])
            filled = 0
        bins[-1].extend(group)
        filled += size
    if len(bins) == 1:
        return (Shard(f"{stem}.safetensors", tuple(bins[0])),)
    return tuple(
        Shard(f"{stem}-{number:05d}-of-{len(bins):05d}.safetensors", tuple(specs))
        for number, specs in enumerate(bins, start=1)
    )


def index(shards: Sequence[Shard]) -> dict[str, object]:
    """The content of `stem`.safetensors.index.json."""
    total = sum(spec.nbytes for shard in shards for spec in shard.specs)
    places = {spec.name: shard.file for shard in shards for spec in shard.specs}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}


class Threads:
    """What goes on beside the writing of files, each in the order it was asked for. Leaving waits for all of it."""

    def __init__(self) -> None:
        self.hashing = ThreadPoolExecutor(1)
        self.disk = ThreadPoolExecutor(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.hashing.shutdown()
        self.disk.shutdown()


class ShardWriter:
    """One open safetensors file. Leaving the context without an error completes it and makes it durable.

    With `threads` hashing goes on beside writing, and the disk begins with what is written, so that the fsync at the
    end is short; only `sync`, called in `threads.disk`, may then close the file.
    """

    def __init__(self, directory: Path, shard: Shard, threads: Threads | None = None) -> None:
        self.path = directory / shard.file
        self._specs = {spec.name: spec for spec in shard.specs}
        self._left = {spec.name: spec.nbytes for spec in shard.specs}
        header, self._ends = _header(shard.specs)
        self._stream = self.path.open("xb")
        self._digest = FileDigest(self.path)
        self._threads = threads
        self._written_back = 0
        self._put(0, header)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stream:
            if kind is None:
                self.complete()
                self.sync()

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """One tensor, which must be what was planned."""
        import torch

        spec = self._specs[name]
        planned = (getattr(torch, DTYPES[spec.dtype][1]), spec.shape)
        assert (tensor.dtype, tuple(tensor.shape)) == planned, (name, tensor.dtype, tensor.shape, spec)
        flat = tensor.contiguous().reshape(-1).view(torch.uint8)
        self.append(name, memoryview(flat.numpy()))

    def append(self, name: str, piece: bytes | memoryview) -> None:
        """The next bytes of a tensor."""
        offset = self._ends[name] - self._left[name]
        self._left[name] -= len(piece)
        assert self._left[name] >= 0, (name, self._specs[name])
        self._put(offset, piece)

    def complete(self) -> str:
        """Requires that all of it was written. Returns the SHA-256 of the file."""
        missing = sorted(name for name, left in self._left.items() if left)
        assert not missing, f"planned and never written: {missing}"
        self._stream.flush()
        return self._digest.finish()

    def sync(self) -> None:
        """Make it durable, and close it."""
        with self._stream:
            self._stream.flush()
            os.fsync(self._stream.fileno())

    def close(self) -> None:
        self._stream.close()

    def _put(self, offset: int, piece: bytes | memoryview) -> None:
        if self._stream.tell() != offset:
            self._stream.seek(offset)
        if self._threads is None:
            self._stream.write(piece)
            self._digest.show(offset, piece)
            return
        shown = self._threads.hashing.submit(self._digest.show, offset, piece)
        self._stream.write(piece)
        shown.result()
        self._begin_write_back(offset + len(piece), self._threads.disk)

    def _begin_write_back(self, end: int, disk: Executor) -> None:
        if end - self._written_back >= _WRITEBACK_BYTES:
            self._stream.flush()
            disk.submit(_write_back, self._stream.fileno(), self._written_back, end)
            self._written_back = end


def _write_back(descriptor: int, begin: int, end: int) -> None:
    """The kernel answers DONTNEED on pages that are not on disk yet by beginning to write them, and keeps them."""
    os.posix_fadvise(descriptor, begin, end - begin, os.POSIX_FADV_DONTNEED)


def _header(specs: Sequence[TensorSpec]) -> tuple[bytes, dict[str, int]]:
    """The first bytes of the file, and where each tensor ends."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    ends = {}
    position = 0
    for spec in sorted(specs, key=lambda spec: (-DTYPES[spec.dtype][0], spec.name)):
        end = position + spec.nbytes
        entries[spec.name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [position, end]}
        ends[spec.name] = position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    return struct.pack("<Q", len(text)) + text, {name: 8 + len(text) + end for name, end in ends.items()}
