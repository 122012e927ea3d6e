"""Asks all replicas of the deployment at once, through a handle of Ray Serve."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from ray import serve as ray_serve

from serve.adapters.reconcile import ReplicaReport
from serve.errors import ReplicaUnreachable

DEPLOYMENT = "EngineReplica"
# Of ray.serve's ReplicaState. A replica that a restarted controller has not checked yet still answers callers.
SERVING_STATES = frozenset({"RUNNING", "UPDATING", "RECOVERING", "PENDING_MIGRATION"})
_HANDLE_LAG_S = 0.1


class RayReplicas:
    """serve.adapters.publish.Replicas through Ray Serve's broadcast."""

    def __init__(self, app_name: str, timeout_s: float) -> None:
        self._app_name = app_name
        self._handle = ray_serve.get_deployment_handle(DEPLOYMENT, app_name)
        self._timeout_s = timeout_s

    async def sync(self, awaited: str | None = None) -> Sequence[ReplicaReport]:
        """Has every replica follow the catalogue. Broadcasts until as many have answered as the controller counts: the
        proxy may send requests to a new replica before this handle knows it. Raises ReplicaUnreachable."""
        deadline = time.monotonic() + self._timeout_s
        while True:
            reports, serving = await asyncio.gather(self._all("sync", awaited), self._serving())
            if len(reports) >= serving:
                return reports
            if time.monotonic() > deadline:
                raise ReplicaUnreachable(f"{serving} replicas serve, but only {len(reports)} could be asked.")
            await asyncio.sleep(_HANDLE_LAG_S)

    async def report(self) -> Sequence[ReplicaReport]:
        """The report of every replica as it is now. Raises ReplicaUnreachable if one does not answer."""
        return await self._all("report")

    async def _all(self, method: str, *args: object) -> Sequence[ReplicaReport]:
        response = self._handle.broadcast(method, *args)
        try:
            reports = await response.results_async(timeout_s=self._timeout_s)
        except Exception as error:
            raise ReplicaUnreachable(f"A replica did not answer within {self._timeout_s} s: {error!r}.") from error
        return [ReplicaReport.model_validate(report) for report in reports]

    async def _serving(self) -> int:
        """How many replicas may be answering callers, as the controller knows it."""
        try:
            async with asyncio.timeout(self._timeout_s):
                status = await asyncio.to_thread(ray_serve.status)
        except Exception as error:
            raise ReplicaUnreachable(f"Ray Serve's controller did not report its replicas: {error!r}.") from error
        states = status.applications[self._app_name].deployments[DEPLOYMENT].replica_states
        return sum(count for state, count in states.items() if state in SERVING_STATES)
