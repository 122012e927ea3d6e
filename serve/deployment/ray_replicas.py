"""Asks all replicas of a pool, or of the whole server, at once, through handles of Ray Serve."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence

from ray import serve as ray_serve

from serve.adapters.reconcile import ReplicaReport
from serve.errors import ReplicaUnreachable

DEPLOYMENT = "EngineReplica"
# Of ray.serve's ReplicaState. A replica that a restarted controller has not checked yet still answers callers.
SERVING_STATES = frozenset({"RUNNING", "UPDATING", "RECOVERING", "PENDING_MIGRATION"})
_HANDLE_LAG_S = 0.1
# After this long a replica has followed the catalogue by itself.
_OTHER_POOLS_S = 2.0


class PoolReplicas:
    """The replicas of one pool, through Ray Serve's broadcast."""

    def __init__(self, app_name: str, timeout_s: float) -> None:
        self._app_name = app_name
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
        try:
            # The client of Ray Serve keeps the handle. That of another pool exists once its application does.
            handle = await asyncio.to_thread(ray_serve.get_deployment_handle, DEPLOYMENT, self._app_name)
            reports = await handle.broadcast(method, *args).results_async(timeout_s=self._timeout_s)
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
        application = status.applications.get(self._app_name)
        deployment = application.deployments.get(DEPLOYMENT) if application else None
        states = deployment.replica_states if deployment else {}
        return sum(count for state, count in states.items() if state in SERVING_STATES)


class ServerReplicas:
    """serve.adapters.publish.Replicas: the replicas of all pools, by the fingerprint of their base model."""

    def __init__(self, pools: Callable[[], Mapping[str, PoolReplicas]]) -> None:
        """`pools`: those that there are now."""
        self._pools = pools

    async def sync(self, awaited: str | None = None, base: str | None = None) -> Sequence[ReplicaReport]:
        """Other pools than that of `base` need only to learn which names there are: they get a moment for it, and one
        that can't answer delays no change of this one for longer."""
        if base is None:
            return await self._sync_all()
        pools = self._pools()
        others = [asyncio.create_task(pool.sync()) for known, pool in pools.items() if known != base]
        try:
            own = pools.get(base)
            reports = await own.sync(awaited) if own else []
            if others:
                await asyncio.wait(others, timeout=_OTHER_POOLS_S)
            return reports
        finally:
            for task in others:
                task.add_done_callback(_ignore)
                task.cancel()

    async def _sync_all(self) -> Sequence[ReplicaReport]:
        """The reports of every pool that answers. Raises ReplicaUnreachable if none does."""
        results = await asyncio.gather(*(pool.sync() for pool in self._pools().values()), return_exceptions=True)
        errors = [result for result in results if isinstance(result, BaseException)]
        if len(errors) == len(results) or not all(isinstance(error, ReplicaUnreachable) for error in errors):
            raise errors[0]
        return [report for result in results if not isinstance(result, BaseException) for report in result]


def _ignore(task: asyncio.Task[Sequence[ReplicaReport]]) -> None:
    """Marks the exception of another pool as retrieved: it follows the catalogue by itself."""
    if not task.cancelled():
        task.exception()
