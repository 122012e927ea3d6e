"""The pipeline from the base's weights to the output, a block of rows at a time.

    reading thread       reads the stored bytes of some rows into a buffer
    computing threads    bring them to float32, add the delta, round once into the same buffer; each has its own block
    the caller           writes the buffer, hashes it, and releases it

Memory is a few blocks, however large a weight is. The speed depends on how often threads wait for Python's interpreter
lock, so few calls are made for a block.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from convert.safetensors_io.prefetch import prefetched
from convert.safetensors_io.reader import TensorReader
from convert.write.blocks import Block, Buffers
from convert.write.tasks import TensorTask

_PREFETCHED_BLOCKS = 2
_COMPUTING_THREADS = min(4, os.cpu_count() or 1)

Output = tuple[int, str, Block]
"""The number of the task, the name of an output tensor, and its next bytes."""


def compute_blocks(tasks: Iterable[TensorTask], reader: TensorReader, buffers: Buffers) -> Generator[Output]:
    """The outputs of all tasks, in order. The caller releases each block's buffer after writing it."""
    blocks = prefetched(_read(tasks, reader, buffers), _PREFETCHED_BLOCKS)
    return prefetched(_compute(blocks), _PREFETCHED_BLOCKS)


def _read(
    tasks: Iterable[TensorTask], reader: TensorReader, buffers: Buffers
) -> Generator[tuple[int, TensorTask, Block | None]]:
    for number, task in enumerate(tasks):
        for block in task.read(reader, buffers):
            yield number, task, block


def _compute(blocks: Generator[tuple[int, TensorTask, Block | None]]) -> Generator[Output]:
    import torch

    threads = torch.get_num_threads()
    pending: deque[Future[list[Output]]] = deque()
    try:
        with ThreadPoolExecutor(_COMPUTING_THREADS) as pool:
            for number, task, block in blocks:
                if block is None:  # a whole weight, for which all threads are used: no block is computed meanwhile
                    yield from _drain(pending)
                    torch.set_num_threads(threads)
                    yield from ((number, *output) for output in task.compute(None))
                else:
                    pending.append(pool.submit(_compute_block, number, task, block))
                    yield from _drain(pending, _COMPUTING_THREADS)
            yield from _drain(pending)
    finally:
        torch.set_num_threads(threads)
        blocks.close()


def _drain(pending: deque[Future[list[Output]]], most_pending: int = 0) -> Generator[Output]:
    """The outputs of the oldest blocks, until at most this many blocks are pending."""
    while len(pending) > most_pending:
        yield from pending.popleft().result()


def _compute_block(number: int, task: TensorTask, block: Block) -> list[Output]:
    """Compute a block on one thread: it is too small to split, and splitting a product may change its last bit."""
    import torch

    torch.set_num_threads(1)
    return [(number, *output) for output in task.compute(block)]
