"""The other replicas of a pool: which adapters they hold, and whether one of them should answer instead of this one.

HAProxy picks a replica without knowing adapters. A replica that would have to evict an adapter, or to let the request
wait for an adapter slot, forwards the request to a holder of the adapter, if that replica isn't busier.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from serve.adapters.reconcile import ReplicaReport
from serve.errors import CatalogueBehind, ServeError, StoreUnavailable
from serve.gateway.routing.forwarding import Forwarder, ForwardTarget
from serve.names import AdapterRevision

MAX_REPORT_AGE_S = 1.0
_LOOPBACK = "127.0.0.1"
_REPORT_TIMEOUT_S = 0.25
_FOLLOW_PAUSE_S = 0.1
# A holder may have twice the requests of this replica and this many more: loading the adapter here would cost more than
# the longer wait there.
_SPARE_REQUESTS = 4

FetchReports = Callable[[], Awaitable[Sequence[ReplicaReport]]]


@dataclass
class RecentReports:
    """The reports of a pool's replicas: fetched when a request needs them, at most once a second."""

    fetch: FetchReports
    timeout_s: float = _REPORT_TIMEOUT_S
    _reports: Sequence[ReplicaReport] = ()
    _fetched_s: float = -MAX_REPORT_AGE_S
    _fetching: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def get(self) -> Sequence[ReplicaReport]:
        """Nothing if the replicas don't report in time."""
        async with self._fetching:
            now = asyncio.get_running_loop().time()
            if now - self._fetched_s >= MAX_REPORT_AGE_S:
                self._fetched_s = now
                self._reports = ()
                with contextlib.suppress(ServeError, TimeoutError):
                    async with asyncio.timeout(self.timeout_s):
                        self._reports = await self.fetch()
            return self._reports


@dataclass
class Peers:
    """The replicas of this replica's own pool."""

    replica: str  # this one
    host: str  # where the other replicas reach this machine
    fetch_reports: FetchReports
    follow: Callable[[], Awaitable[None]]  # has this replica follow the catalogue
    is_alone: bool = False  # its pool has no other replica
    address: str | None = None
    forwarder: Forwarder = field(default_factory=Forwarder)
    _following: asyncio.Lock = field(default_factory=asyncio.Lock)

    def __post_init__(self) -> None:
        self._reports = RecentReports(self.fetch_reports)

    def listens_on(self, port: int) -> None:
        self.address = f"{self.host}:{port}"

    async def holder_of(self, adapter: AdapterRevision) -> ForwardTarget | None:
        """A replica that would run a request of the adapter at once; None if there is none, or if the reports don't
        come in time."""
        if self.is_alone:
            return None
        reports = await self._reports.get()
        own_requests = next((report.running_requests for report in reports if report.replica == self.replica), 0)
        candidates = [
            (report.running_requests, report.replica, report.address)
            for report in reports
            if report.address and report.replica != self.replica and adapter.engine_name in report.resident
            if not report.waiting_requests and report.running_requests <= 2 * own_requests + _SPARE_REQUESTS
        ]
        if not candidates:
            return None
        _, replica, address = min(candidates)
        return ForwardTarget(replica, reachable_address(address, self.host))

    @property
    def forwarded(self) -> int:
        """The requests that another replica, also of another pool, answered for this one."""
        return self.forwarder.forwarded

    async def catch_up(self, epoch: int, reached: Callable[[], int], within_s: float) -> None:
        """Returns when the epoch that this replica has `reached` is `epoch` or a later one. Raises CatalogueBehind
        after `within_s`, or if the catalogue can't be read."""
        try:
            async with asyncio.timeout(within_s), self._following:
                while reached() < epoch:
                    await self.follow()
                    if reached() < epoch:
                        await asyncio.sleep(_FOLLOW_PAUSE_S)
        except (TimeoutError, StoreUnavailable) as error:
            raise CatalogueBehind(within_s) from error


def reachable_address(address: str, own_host: str) -> str:
    """The loopback address for a replica on the same machine, as Ray Serve's proxy uses: the replicas of a server that
    listens on loopback listen nowhere else. `own_host`: where others reach this machine."""
    host, _, port = address.rpartition(":")
    return f"{_LOOPBACK}:{port}" if host == own_host else address
