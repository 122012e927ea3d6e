"""Reports changes of the catalogue to `serve.observability.events`, for metrics and logs."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from serve.adapters.publish import Control, Published
from serve.adapters.reconcile import ReplicaReport
from serve.catalogue.candidate import Candidate
from serve.catalogue.entry import Audit
from serve.errors import ServeError
from serve.names import AdapterRevision
from serve.observability.events import NO_EVENTS, Events

_NO_AUDIT = Audit()
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class ReportingControl(Control):
    """A `Control` that reports each change, and how it ended, to `events`. A promotion that has to publish first is
    reported as both."""

    events: Events = NO_EVENTS

    async def publish(self, candidate: Candidate, audit: Audit = _NO_AUDIT) -> Published:
        return await self._report("publish", candidate.name, super().publish(candidate, audit))

    async def stage(self, candidate: Candidate, audit: Audit = _NO_AUDIT) -> Published:
        return await self._report("stage", candidate.name, super().stage(candidate, audit))

    async def promote(self, name: str, revision: str, audit: Audit = _NO_AUDIT) -> Published:
        return await self._report("promote", name, super().promote(name, revision, audit))

    async def roll_back(self, name: str, revision: str | None = None, audit: Audit = _NO_AUDIT) -> Published:
        return await self._report("rollback", name, super().roll_back(name, revision, audit))

    async def abandon(self, name: str, revision: str, audit: Audit = _NO_AUDIT) -> Sequence[ReplicaReport]:
        return await self._report("abandon", name, super().abandon(name, revision, audit))

    async def retire(self, name: str, audit: Audit = _NO_AUDIT) -> Sequence[ReplicaReport]:
        return await self._report("retire", name, super().retire(name, audit))

    async def pin(self, name: str, revision: str | None, audit: Audit = _NO_AUDIT) -> AdapterRevision:
        return await self._report("pin", name, super().pin(name, revision, audit))

    async def _report(self, verb: str, name: str, change: Awaitable[_Result]) -> _Result:
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
