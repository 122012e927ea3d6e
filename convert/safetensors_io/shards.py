"""Safetensors files written as a stream: the header first, from the planned tensors, then the tensors in any order.

A file has the bytes that the safetensors library would write: tensors of large element types come first, then they are
ordered by name, so that every tensor is aligned to its type.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from convert.artifact.durable_files import sync
from convert.safetensors_io.direct_io import CachedFile, IoThreads, NewFile, UncachedFile
from convert.safetensors_io.tensors import DTYPES, TensorSpec

if TYPE_CHECKING:
    import torch

# A killed conversion loses the unfinished shard, at most this much.
SHARD_BYTES = 1_000_000_000


@dataclass(frozen=True)
class Shard:
    """One file and the tensors that it will hold."""

    file: str
    specs: tuple[TensorSpec, ...]


def split(groups: Iterable[Sequence[TensorSpec]], stem: str, limit_bytes: int = SHARD_BYTES) -> tuple[Shard, ...]:
    """Fill files in order up to the limit. A group, which is the parts of one weight, stays in one file."""
    files: list[list[TensorSpec]] = [[]]
    filled_bytes = 0
    for group in groups:
        group_bytes = sum(spec.nbytes for spec in group)
        if files[-1] and filled_bytes + group_bytes > limit_bytes:
            files.append([])
            filled_bytes = 0
        files[-1].extend(group)
        filled_bytes += group_bytes
    if len(files) == 1:
        return (Shard(f"{stem}.safetensors", tuple(files[0])),)
    return tuple(
        Shard(f"{stem}-{number:05d}-of-{len(files):05d}.safetensors", tuple(specs))
        for number, specs in enumerate(files, start=1)
    )


def index(shards: Sequence[Shard]) -> dict[str, object]:
    """The content of `stem`.safetensors.index.json, as transformers reads it."""
    total = sum(spec.nbytes for shard in shards for spec in shard.specs)
    weight_map = {spec.name: shard.file for shard in shards for spec in shard.specs}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


class ShardWriter:
    """One open safetensors file. Leaving the context without an error completes it and makes it durable.

    `threads`: they write and hash the file, past the page cache. None: the caller does, through the page cache.
    """

    def __init__(self, directory: Path, shard: Shard, threads: IoThreads | None = None) -> None:
        self.path = directory / shard.file
        self._specs = {spec.name: spec for spec in shard.specs}
        self._left = {spec.name: spec.nbytes for spec in shard.specs}
        header, self._ends = _header(shard.specs)
        self._file: NewFile = UncachedFile(self.path, threads) if threads else CachedFile(self.path)
        self._file.write(0, memoryview(header))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.complete()
                sync(self.path)
        finally:
            self.close()

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one whole tensor, of the planned type and shape."""
        import torch

        spec = self._specs[name]
        planned = (getattr(torch, DTYPES[spec.dtype][1]), spec.shape)
        assert (tensor.dtype, tuple(tensor.shape)) == planned, (name, tensor.dtype, tensor.shape, spec)
        flat = tensor.contiguous().reshape(-1).view(torch.uint8)
        self.append(name, memoryview(flat.numpy()))

    def append(self, name: str, piece: memoryview) -> None:
        """Write the next bytes of a tensor."""
        offset = self._ends[name] - self._left[name]
        self._left[name] -= len(piece)
        assert self._left[name] >= 0, (name, self._specs[name])
        self._file.write(offset, piece)

    def complete(self) -> str:
        """Complete the file, after every tensor is written. Returns its SHA-256."""
        missing = sorted(name for name, left in self._left.items() if left)
        assert not missing, f"planned and never written: {missing}"
        return self._file.complete()

    def close(self) -> None:
        self._file.close()


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
