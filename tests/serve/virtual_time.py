"""An event loop whose clock jumps to the next timer: minutes of waiting in no time, and the same every time."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")


class _Selector(selectors.SelectSelector):
    """Tells how long the loop would have slept instead of sleeping."""

    def __init__(self, slept: Callable[[float], None]) -> None:
        super().__init__()
        self._slept = slept

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        events = super().select(0)
        if not events:
            assert timeout is not None, "everyone waits, and nothing will ever happen"
            self._slept(timeout)
        return events


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._now = 0.0
        super().__init__(_Selector(self._sleep))

    def time(self) -> float:
        return self._now

    def run_in_executor(self, executor: Any, function: Any, *args: Any) -> asyncio.Future[Any]:
        """At once and in place: a real thread would take real time."""
        future = self.create_future()
        try:
            future.set_result(function(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    def _sleep(self, seconds: float) -> None:
        self._now += seconds


class SkippableLoop(asyncio.SelectorEventLoop):
    """Real time, of which a test can skip some: real servers answer, and nobody waits for a timer."""

    def __init__(self) -> None:
        self._skipped_s = 0.0
        super().__init__()

    def time(self) -> float:
        return super().time() + self._skipped_s

    def skip(self, seconds: float) -> None:
        self._skipped_s += seconds


def skip(seconds: float) -> None:
    """Has that time pass at once, in a test with the marker `skippable_time`."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, SkippableLoop)
    loop.skip(seconds)


def run(main: Coroutine[Any, Any, Result]) -> Result:
    """`asyncio.run` in virtual time. Fails if everyone waits for something that can't come."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main)
