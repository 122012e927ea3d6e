"""Reading tensors in pieces into memory that the caller has, and hashing the files along the way."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from convert.digests import FileDigest
from convert.tensors import Tensors


class TensorReader:
    """Files stay open until the context is left. Read in the order of a file, its bytes are read only once."""

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
        path, offset = self._tensors.place(name)
        stream = self._streams.get(path) or self._open(path)
        if not _fill(stream.fileno(), view, offset + start):
            raise self._tensors.shorter(path, name)
        self._digests[path].show(offset + start, view)

    def digests(self) -> dict[str, str]:
        """SHA-256 of every file, by name. What was not read in order is read now."""
        return {path.name: digest.finish() for path, digest in self._digests.items()}

    def _open(self, path: Path) -> BinaryIO:
        stream = self._streams[path] = self._stack.enter_context(path.open("rb", buffering=0))
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        self._digests[path].show(0, stream.read(self._tensors.data_begin(path)))
        return stream


def _fill(descriptor: int, view: memoryview, offset: int) -> bool:
    """False where the file ends before the view is full."""
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if count == 0:
            return False
        done += count
    return True
