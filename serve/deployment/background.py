"""Work that the server's own process repeats while it runs."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_PERIOD_S = 0.5

logger = logging.getLogger(__name__)


@contextmanager
def repeated(update: Callable[[], None], failure: str) -> Iterator[None]:
    """Has a thread call `update` twice a second until the block ends. `failure` is the warning where it raises: once,
    until it succeeds again."""
    ended = threading.Event()
    thread = threading.Thread(target=_repeat, args=(update, failure, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _repeat(update: Callable[[], None], failure: str, ended: threading.Event) -> None:
    failing = False
    while not ended.wait(_PERIOD_S):
        try:
            update()
            failing = False
        except Exception:  # any error may be over at the next attempt, and requests are answered meanwhile
            if not failing:
                logger.warning("Warning: %s", failure, exc_info=True)
            failing = True
