"""New files that are written in pieces and hashed meanwhile: through the page cache, or past it (O_DIRECT).

Filling the page cache takes more processor time than computing the bytes, and evicts what other processes read. Linux
writes past the cache only from aligned memory to aligned offsets (open(2), O_DIRECT): bytes that follow one another are
collected in blocks, and the bytes at the ends of such a run go through the cache. On a file system without O_DIRECT all
bytes do.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy

from convert.safetensors_io.digests import FileDigest

_BLOCK_BYTES = 4 << 20
_BLOCK_COUNT = 8
_DISK_THREADS = 3
_ALIGNMENT = max(4096, mmap.PAGESIZE)
_HUGE_PAGE = 2 << 20
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL


class NewFile(Protocol):
    """A file of which each byte is written once. It is hashed meanwhile if its bytes come in order, else read again."""

    def write(self, offset: int, piece: memoryview) -> None:
        """Write the bytes of `piece` at `offset`. The caller may change the memory of `piece` afterwards."""
        ...

    def complete(self) -> str:
        """Complete the file, after the last write. Returns its SHA-256."""
        ...

    def close(self) -> None: ...


class CachedFile:
    """Written through the page cache, by the caller's thread."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, _NEW, 0o666)
        self._digest = FileDigest(path)

    def write(self, offset: int, piece: memoryview) -> None:
        _write_all(self._descriptor, piece, offset)
        self._digest.update(offset, piece)

    def complete(self) -> str:
        return self._digest.finish()

    def close(self) -> None:
        os.close(self._descriptor)


class _Block:
    """Memory, and the tasks that still read it."""

    def __init__(self, array: numpy.ndarray[Any, numpy.dtype[numpy.uint8]]) -> None:
        self.array = array  # numpy copies into it without the interpreter lock
        self.view = array.data
        self.readers: tuple[Future[None], ...] = ()

    def wait(self) -> None:
        """Wait until the block may be filled again. Raises the error of its writing."""
        for reader in self.readers:
            reader.result()


class IoThreads:
    """The threads that hash and write blocks, and the memory of the blocks. Leaving the context waits for them."""

    def __init__(self) -> None:
        self.hashing = ThreadPoolExecutor(1)  # one thread, so that blocks are hashed in order
        self.disk = ThreadPoolExecutor(_DISK_THREADS)
        self.blocks = deque(map(_Block, numpy.split(_huge_pages(_BLOCK_COUNT * _BLOCK_BYTES), _BLOCK_COUNT)))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.hashing.shutdown()
        self.disk.shutdown()


def _huge_pages(size: int) -> numpy.ndarray[Any, numpy.dtype[numpy.uint8]]:
    """Memory of huge pages: a disk writes a few large pages twice as fast as a thousand small ones."""
    memory = mmap.mmap(-1, size + _HUGE_PAGE)
    with contextlib.suppress(AttributeError, OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    array = numpy.frombuffer(memory, numpy.uint8)
    begin = -array.ctypes.data % _HUGE_PAGE
    return array[begin : begin + size]


class UncachedFile:
    """Written past the page cache, by other threads."""

    def __init__(self, path: Path, threads: IoThreads) -> None:
        self._cached = os.open(path, _NEW, 0o666)
        self._direct = _open_direct(path)
        self._digest = FileDigest(path)
        self._threads = threads
        self._blocks = threads.blocks  # the first one is being filled, with the bytes from `_begin` on
        self._begin = self._filled = 0

    def write(self, offset: int, piece: memoryview) -> None:
        if offset != self._begin + self._filled:
            self._flush()
        if not self._filled:
            head = min(len(piece), -offset % _ALIGNMENT)
            self._write_through_cache(offset, piece[:head])
            self._begin, piece = offset + head, piece[head:]
        while len(piece):
            taken = min(len(piece), _BLOCK_BYTES - self._filled)
            self._blocks[0].array[self._filled : self._filled + taken] = numpy.frombuffer(piece[:taken], numpy.uint8)
            self._filled += taken
            piece = piece[taken:]
            if self._filled == _BLOCK_BYTES:
                self._submit_block()

    def complete(self) -> str:
        self._flush()
        for block in self._blocks:
            block.wait()
        return self._digest.finish()

    def close(self) -> None:
        os.close(self._cached)
        if self._direct is not None:
            os.close(self._direct)

    def _submit_block(self) -> None:
        """Hash and write the first block; the next one is free when this returns."""
        block = self._blocks[0]
        block.readers = (
            self._threads.hashing.submit(self._digest.update, self._begin, block.view),
            self._threads.disk.submit(self._write_block, self._begin, block.view),
        )
        self._blocks.rotate(-1)
        self._blocks[0].wait()
        self._begin += _BLOCK_BYTES
        self._filled = 0

    def _flush(self) -> None:
        self._write_through_cache(self._begin, self._blocks[0].view[: self._filled])
        self._begin += self._filled
        self._filled = 0

    def _write_through_cache(self, offset: int, piece: memoryview) -> None:
        if len(piece):
            _write_all(self._cached, piece, offset)
            self._threads.hashing.submit(self._digest.update, offset, piece).result()

    def _write_block(self, offset: int, block: memoryview) -> None:
        if self._direct is not None:
            try:
                _write_all(self._direct, block, offset)
            except OSError as error:
                if error.errno != errno.EINVAL:  # other file systems accept the flag, but no write with it
                    raise
            else:
                return
        _write_all(self._cached, block, offset)


def _open_direct(path: Path) -> int | None:
    """A descriptor with O_DIRECT; None on a file system without it."""
    try:
        return os.open(path, os.O_WRONLY | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return None


def _write_all(descriptor: int, piece: memoryview, offset: int) -> None:
    written = 0
    while written < len(piece):
        written += os.pwrite(descriptor, piece[written:], offset + written)
