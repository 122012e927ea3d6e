"""Requests for adapters in virtual time, and a record of when each one began and ended."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from serve.adapters.slot_scheduler import SlotScheduler, WaitLimits
from serve.names import AdapterRevision
from tests.serve.conftest import revision
from tests.serve.virtual_time import run

ADAPTERS = [revision(f"adapter-{number}", "w") for number in range(8)]
FRENCH, PIRATE, JSON, GERMAN = ADAPTERS[:4]
TURN_S = 1.0
LONG = WaitLimits(max_waiting=10_000, max_waiting_per_caller=10_000, max_wait_s=1e6, turn_s=TURN_S)


@dataclass
class Story:
    """What happened, in order: `+french` a request began, `-french` it ended."""

    slots: SlotScheduler
    events: list[tuple[float, str]] = field(default_factory=list)
    running: list[AdapterRevision] = field(default_factory=list)
    most_at_once: int = 0

    async def request(self, adapter: AdapterRevision, takes_s: float, caller: str = "") -> None:
        async with self.slots.acquire(adapter, caller):
            self.running.append(adapter)
            self.most_at_once = max(self.most_at_once, len(set(self.running)))
            self._tell(f"+{adapter.name}")
            try:
                await asyncio.sleep(takes_s)
            finally:
                self.running.remove(adapter)
                self._tell(f"-{adapter.name}")

    def _tell(self, event: str) -> None:
        self.events.append((round(asyncio.get_running_loop().time(), 6), event))

    @property
    def begun(self) -> list[str]:
        return [event[1:] for _, event in self.events if event[0] == "+"]

    def waited_s(self, adapter: AdapterRevision) -> float:
        return next(at for at, event in self.events if event == f"+{adapter.name}")


def story(act: Callable[[Story], Coroutine[Any, Any, None]], slots: int = 1, limits: WaitLimits = LONG) -> Story:
    async def main() -> Story:
        finished = Story(SlotScheduler(slots, limits))
        await act(finished)
        assert finished.slots.waiting == 0
        assert finished.slots.waiting_adapters == frozenset()
        assert finished.slots.running_adapters == frozenset()
        return finished

    return run(main())
