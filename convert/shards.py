"""Safetensors files written as a stream: the header first, from what is planned, then tensor after tensor.

The order inside a file is that of the safetensors library (large element types first, then by name), which keeps
every tensor aligned to its type. Tensors may arrive in any order: each has its place.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from convert.tensors import DTYPES, TensorSpec

if TYPE_CHECKING:
    import torch

SHARD_BYTES = 2_000_000_000


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


class ShardWriter:
    """One open safetensors file. Leaving the context without an error requires that all of it was written."""

    def __init__(self, directory: Path, shard: Shard) -> None:
        self._path = directory / shard.file
        self._missing = {spec.name: spec for spec in shard.specs}
        header, self._offsets = _header(shard.specs)
        self._stream = self._path.open("xb")
        self._stream.write(header)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stream:
            if kind is None:
                assert not self._missing, f"planned and never written: {sorted(self._missing)}"
                self._stream.flush()
                os.fsync(self._stream.fileno())

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """One tensor, which must be what was planned."""
        import torch

        spec = self._missing[name]
        planned = (getattr(torch, DTYPES[spec.dtype][1]), spec.shape)
        assert (tensor.dtype, tuple(tensor.shape)) == planned, (name, tensor.dtype, tensor.shape, spec)
        flat = tensor.contiguous().reshape(-1).view(torch.uint8)
        self.copy(name, [memoryview(flat.numpy())])

    def copy(self, name: str, pieces: Iterable[bytes | memoryview]) -> None:
        """One tensor as bytes, in pieces."""
        spec = self._missing.pop(name)
        self._stream.seek(self._offsets[name])
        written = sum(self._stream.write(piece) for piece in pieces)
        assert written == spec.nbytes, (name, written, spec)


def _header(specs: Sequence[TensorSpec]) -> tuple[bytes, dict[str, int]]:
    """The first bytes of the file, and where each tensor begins."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets = {}
    position = 0
    for spec in sorted(specs, key=lambda spec: (-DTYPES[spec.dtype][0], spec.name)):
        end = position + spec.nbytes
        entries[spec.name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [position, end]}
        offsets[spec.name] = position
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    return struct.pack("<Q", len(text)) + text, {name: 8 + len(text) + start for name, start in offsets.items()}
