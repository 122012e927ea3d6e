"""The requests that a replica has open."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class OpenRequests:
    """Knows for how long there has been none."""

    def __init__(self) -> None:
        self._open = 0
        self._ended_s = time.monotonic()

    @contextmanager
    def counted(self) -> Iterator[None]:
        """A request, until the block ends."""
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1
            self.begin()

    def begin(self) -> None:
        """From now on time without a request counts."""
        self._ended_s = time.monotonic()

    @property
    def idle_s(self) -> float:
        return 0.0 if self._open else time.monotonic() - self._ended_s
