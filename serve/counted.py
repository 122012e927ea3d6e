"""Changes of the catalogue that are told to whoever counts them."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from serve.candidate import Candidate
from serve.entry import Cause
from serve.errors import ServeError
from serve.events import NOBODY, Events
from serve.names import AdapterRevision
from serve.publish import Control, Published
from serve.reconcile import ReplicaReport

_NOBODY = Cause()
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class CountedControl(Control):
    """`Control`, and what came of each change. One that publishes on its way is told as both."""

    events: Events = NOBODY

    async def publish(self, candidate: Candidate, cause: Cause = _NOBODY) -> Published:
        return await self._told("publish", candidate.name, super().publish(candidate, cause))

    async def stage(self, candidate: Candidate, cause: Cause = _NOBODY) -> Published:
        return await self._told("stage", candidate.name, super().stage(candidate, cause))

    async def promote(self, name: str, revision: str, cause: Cause = _NOBODY) -> Published:
        return await self._told("promote", name, super().promote(name, revision, cause))

    async def roll_back(self, name: str, revision: str | None = None, cause: Cause = _NOBODY) -> Published:
        return await self._told("rollback", name, super().roll_back(name, revision, cause))

    async def abandon(self, name: str, revision: str, cause: Cause = _NOBODY) -> Sequence[ReplicaReport]:
        return await self._told("abandon", name, super().abandon(name, revision, cause))

    async def retire(self, name: str, cause: Cause = _NOBODY) -> Sequence[ReplicaReport]:
        return await self._told("retire", name, super().retire(name, cause))

    async def pin(self, name: str, revision: str | None, cause: Cause = _NOBODY) -> AdapterRevision:
        return await self._told("pin", name, super().pin(name, revision, cause))

    async def _told(self, verb: str, name: str, change: Awaitable[_Result]) -> _Result:
        try:
            result = await change
        except ServeError as error:
            self.events.changed(verb, name, error.code)
            raise
        if isinstance(result, Published):
            self.events.changed(verb, name, "done", result.staged_s, result.promoted_s)
        else:
            self.events.changed(verb, name, "done")
        return result
