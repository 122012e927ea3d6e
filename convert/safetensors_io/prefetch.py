"""A thread that computes the next items of a generator while the caller uses the last ones."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from queue import Queue
from typing import TypeVar

Item = TypeVar("Item")


class _End:
    """The last entry of the queue, with the error that ended the thread."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


def prefetched(items: Generator[Item], depth: int) -> Generator[Item]:
    """The same items in the same order, computed in a thread; at most `depth` of them wait.

    An error of that thread is raised here, at its place in the order. Closing this generator closes `items` in their
    thread, and waits for that.
    """
    queue: Queue[Item | _End] = Queue(depth)
    stopped = threading.Event()
    thread = threading.Thread(target=_fill, args=(queue, items, stopped), daemon=True)
    thread.start()
    try:
        yield from _until_end(queue)
    finally:
        stopped.set()
        while thread.is_alive():
            _drain(queue)
            thread.join(0.01)


def _fill(queue: Queue[Item | _End], items: Generator[Item], stopped: threading.Event) -> None:
    end = _End()
    try:
        for item in items:
            if stopped.is_set():
                break
            queue.put(item)
        items.close()
    except BaseException as error:  # raised again where the items are used
        end = _End(error)
    queue.put(end)


def _until_end(queue: Queue[Item | _End]) -> Iterator[Item]:
    while not isinstance(item := queue.get(), _End):
        yield item
    if item.error is not None:
        raise item.error


def _drain(queue: Queue[Item | _End]) -> None:
    while not queue.empty():
        queue.get_nowait()
