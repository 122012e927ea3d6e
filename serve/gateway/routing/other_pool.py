"""Another pool of the server, as a replica sees it: a request for its models is forwarded to one of its replicas.

The proxy sends most requests to the right pool. Those whose `model` it could not read, or does not know yet, arrive at
any replica.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Sequence

from starlette.types import Scope, Send

from serve.adapters.reconcile import ReplicaReport
from serve.errors import PoolUnavailable
from serve.gateway.routing.forwarding import EPOCH_HEADER, Forwarder, ForwardLimits, ForwardTarget
from serve.gateway.routing.peers import FetchReports, RecentReports, reachable_address
from serve.gateway.routing.wake_queue import WakeQueue
from serve.settings import PoolSettings

# Longer than for holders of an adapter, which a request can do without.
_REPORT_TIMEOUT_S = 2.0
_FIND_WITHIN_S = 1.0
_FIND_PAUSE_S = 0.2
# The proxy repeats a request that found no replica, three times: it shall not wait again.
_OUT_OF_REACH_S = 2.0


class OtherPool:
    """Finds the replicas of the pool by their reports, and remembers what does not change while the pool runs."""

    def __init__(
        self,
        settings: PoolSettings,
        host: str,
        fetch_reports: FetchReports,
        forwarder: Forwarder,
        wakes: WakeQueue,
    ) -> None:
        """`host`: where others reach this machine."""
        self.settings = settings
        self.name = settings.engine.model_name
        self.base = settings.engine.fingerprint
        self._host = host
        self._reports = RecentReports(fetch_reports, _REPORT_TIMEOUT_S)
        self._forwarder = forwarder
        self._wakes = wakes
        self._context_tokens: int | None = None
        self._out_of_reach_until_s = -math.inf

    async def is_ready(self) -> bool:
        """Whether a replica of the pool answers, or will as soon as a request wakes the pool."""
        return self.settings.asleep or bool(await self._reports.get())

    async def context_tokens(self) -> int | None:
        """The most tokens of a prompt and its answer together; None until a replica of the pool has said it."""
        if self._context_tokens is None:
            self._context_tokens = next((report.context_tokens for report in await self._reports.get()), None)
        return self._context_tokens

    async def forward(
        self, model: str, scope: Scope, body: bytes, send: Send, limits: ForwardLimits, epoch: int
    ) -> bool:
        """Has a replica of the pool answer the request, the least busy one that holds the adapter first. `epoch`: how
        far this replica has followed the catalogue. A sleeping pool is woken, and waited for. Returns True, or
        raises PoolUnavailable or PoolAsleep if none can be reached, and what `Forwarder.forward` raises."""
        headers = [(EPOCH_HEADER.encode(), str(epoch).encode())]
        waking_s = await self._waking_s()
        is_out_of_reach = waking_s <= 0 and _now() < self._out_of_reach_until_s
        deadline = _now() if is_out_of_reach else _now() + max(waking_s, _FIND_WITHIN_S)
        while True:
            targets = await self._targets(model, deadline, is_waking=waking_s > 0)
            for target in targets:
                is_last = target is targets[-1]
                if await self._forwarder.forward(
                    target, scope, body, send, limits, headers=headers, relays_503=is_last
                ):
                    return True
            if waking_s <= 0 or _now() > deadline:
                raise PoolUnavailable(self.name)
            await asyncio.sleep(_FIND_PAUSE_S)  # what was found still ends: the engines of the pool start after it

    async def _waking_s(self) -> float:
        """How long a request may wait for the engines to start; not positive for a pool that is awake. Raises
        PoolAsleep."""
        woken_at = await self._wakes.wake(self.name) if self.settings.asleep else self.settings.woken_at
        return self._wakes.left_s(woken_at) if woken_at else 0.0

    async def _targets(self, model: str, deadline: float, *, is_waking: bool) -> Sequence[ForwardTarget]:
        """The replicas that can be asked, the best one first. Waits for the first one to report."""
        with self._wakes.place(self.name) if is_waking else contextlib.nullcontext():
            while not (reports := [report for report in await self._reports.get() if report.address]):
                if _now() > deadline:
                    self._out_of_reach_until_s = _now() + _OUT_OF_REACH_S
                    if self.settings.sleep_after_s is not None:
                        await self._wakes.give_up(self.name)
                    raise self._wakes.too_late(self.name) if is_waking else PoolUnavailable(self.name)
                await asyncio.sleep(_FIND_PAUSE_S)
        prefix = self.settings.route_prefix.rstrip("/")
        return [
            ForwardTarget(report.replica, reachable_address(report.address or "", self._host), prefix)
            for report in sorted(reports, key=lambda report: _preference(report, model))
        ]


def _now() -> float:
    return asyncio.get_running_loop().time()


def _preference(report: ReplicaReport, model: str) -> tuple[bool, int, str]:
    name = model.partition("@")[0]
    holds_it = any(resident.partition("@")[0] == name for resident in report.resident)
    return not holds_it, report.running_requests + report.waiting_requests, report.replica
