"""New files, written in pieces that have their offsets, and hashed along the way: through the page cache, or past it.

Filling the cache takes more processor time than making the bytes, and puts out of it what others on the machine read.
Linux writes past it (O_DIRECT) from aligned memory to aligned places only: bytes that follow one another are collected
in blocks, and what is left over at the ends of a run goes through the cache. Where a file system knows no such writes,
everything does.
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

from convert.digests import FileDigest

_BLOCK_BYTES = 4 << 20
_BLOCKS = 8
_DISK_THREADS = 3
_ALIGNMENT = max(4096, mmap.PAGESIZE)
_HUGE_PAGE = 2 << 20
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL


class NewFile(Protocol):
    """Bytes are written once each. A file whose bytes come in order is hashed in passing, any other read once more."""

    def write(self, offset: int, piece: memoryview) -> None:
        """The piece may be changed when this returns."""
        ...

    def complete(self) -> str:
        """Everything was written: the SHA-256 of the file."""
        ...

    def close(self) -> None: ...


class CachedFile:
    """Through the page cache, by the caller's thread."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, _NEW, 0o666)
        self._digest = FileDigest(path)

    def write(self, offset: int, piece: memoryview) -> None:
        _write_all(self._descriptor, piece, offset)
        self._digest.show(offset, piece)

    def complete(self) -> str:
        return self._digest.finish()

    def close(self) -> None:
        os.close(self._descriptor)


class _Block:
    """Memory, and what still reads it."""

    def __init__(self, array: numpy.ndarray[Any, numpy.dtype[numpy.uint8]]) -> None:
        self.array = array  # copying into it holds up no other thread
        self.view = array.data
        self.readers: tuple[Future[None], ...] = ()

    def wait(self) -> None:
        """Until it may be filled again. Raises what its writing raised."""
        for reader in self.readers:
            reader.result()


class Threads:
    """What goes on beside the making of bytes, and the memory for it. Leaving waits for all of it."""

    def __init__(self) -> None:
        self.hashing = ThreadPoolExecutor(1)  # in order
        self.disk = ThreadPoolExecutor(_DISK_THREADS)
        self.blocks = deque(_Block(it) for it in numpy.split(_huge_pages(_BLOCKS * _BLOCK_BYTES), _BLOCKS))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.hashing.shutdown()
        self.disk.shutdown()


def _huge_pages(size: int) -> numpy.ndarray[Any, numpy.dtype[numpy.uint8]]:
    """A disk takes a request of a few large pages twice as fast as one of a thousand small ones."""
    memory = mmap.mmap(-1, size + _HUGE_PAGE)
    with contextlib.suppress(AttributeError, OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    array = numpy.frombuffer(memory, numpy.uint8)
    begin = -array.ctypes.data % _HUGE_PAGE
    return array[begin : begin + size]


class UncachedFile:
    """Past the page cache, by other threads."""

    def __init__(self, path: Path, threads: Threads) -> None:
        self._cached = os.open(path, _NEW, 0o666)
        self._direct = _open_direct(path)
        self._digest = FileDigest(path)
        self._threads = threads
        self._blocks = threads.blocks  # the first is being filled, with the bytes from `begin` on
        self._begin = self._filled = 0

    def write(self, offset: int, piece: memoryview) -> None:
        if offset != self._begin + self._filled:
            self._spill()
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
                self._send()

    def complete(self) -> str:
        self._spill()
        for block in self._blocks:
            block.wait()
        return self._digest.finish()

    def close(self) -> None:
        os.close(self._cached)
        if self._direct is not None:
            os.close(self._direct)

    def _send(self) -> None:
        """The first block to the disk; the next one is free when this returns."""
        block = self._blocks[0]
        block.readers = (
            self._threads.hashing.submit(self._digest.show, self._begin, block.view),
            self._threads.disk.submit(self._write_block, self._begin, block.view),
        )
        self._blocks.rotate(-1)
        self._blocks[0].wait()
        self._begin += _BLOCK_BYTES
        self._filled = 0

    def _spill(self) -> None:
        self._write_through_cache(self._begin, self._blocks[0].view[: self._filled])
        self._begin += self._filled
        self._filled = 0

    def _write_through_cache(self, offset: int, piece: memoryview) -> None:
        if len(piece):
            _write_all(self._cached, piece, offset)
            self._threads.hashing.submit(self._digest.show, offset, piece).result()

    def _write_block(self, offset: int, block: memoryview) -> None:
        if self._direct is not None:
            try:
                _write_all(self._direct, block, offset)
            except OSError as error:
                if error.errno != errno.EINVAL:  # of a file system that takes the flag and then no write
                    raise
            else:
                return
        _write_all(self._cached, block, offset)


def sync(path: Path) -> None:
    """Make a file durable, or the names in a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _open_direct(path: Path) -> int | None:
    try:
        return os.open(path, os.O_WRONLY | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return None


def _write_all(descriptor: int, piece: memoryview, offset: int) -> None:
    done = 0
    while done < len(piece):
        done += os.pwrite(descriptor, piece[done:], offset + done)
