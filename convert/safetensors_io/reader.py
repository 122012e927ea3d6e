"""Reads pieces of tensors into the caller's memory, and hashes the files meanwhile."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from convert.safetensors_io.digests import FileDigest
from convert.safetensors_io.tensors import Tensors


class TensorReader:
    """Reads pieces of tensors. Files stay open until the context is left; those read in order are hashed meanwhile."""

    def __init__(self, tensors: Tensors) -> None:
        self._tensors = tensors
        self._digests = {path: FileDigest(path) for path in tensors.files}
        self._streams: dict[Path, BinaryIO] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def read_into(self, view: memoryview, name: str, start: int) -> None:
        """Fill `view` with the bytes of a tensor from its byte `start` on."""
        path, offset = self._tensors.location(name)
        stream = self._streams.get(path) or self._open(path)
        if not _fill(stream.fileno(), view, offset + start):
            raise self._tensors.truncated(path, name)
        self._digests[path].update(offset + start, view)

    def digests(self) -> dict[str, str]:
        """SHA-256 of every file, by name. Bytes that were not read in order are read now."""
        return {path.name: digest.finish() for path, digest in self._digests.items()}

    def _open(self, path: Path) -> BinaryIO:
        stream = self._streams[path] = self._stack.enter_context(path.open("rb", buffering=0))
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        self._digests[path].update(0, stream.read(self._tensors.header_bytes(path)))
        return stream


def _fill(descriptor: int, view: memoryview, offset: int) -> bool:
    """False where the file ends before the view is full."""
    filled = 0
    while filled < len(view):
        count = os.preadv(descriptor, [view[filled:]], offset + filled)
        if count == 0:
            return False
        filled += count
    return True
