"""How a replica reaches the replicas of its own pool, and those of the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from serve.catalogue.catalogue import Catalogue
from serve.catalogue.pool_changes import pools_of
from serve.deployment.ray_replicas import PoolReplicas
from serve.gateway.routing.forwarding import Forwarder
from serve.gateway.routing.other_pool import OtherPool
from serve.gateway.routing.wake_queue import WakeQueue
from serve.settings import PoolSettings, ServeSettings


class PoolConnections:
    """Follows the catalogue: a pool that was added is reached without a restart."""

    def __init__(
        self, settings: ServeSettings, application: str, host: str, catalogue: Callable[[], Catalogue]
    ) -> None:
        """`application`: this replica's own, by Ray Serve; `host`: where others reach this machine."""
        self._settings = settings
        self._host = host
        self._catalogue = catalogue
        self.own = PoolReplicas(application, settings.sync_timeout_s)

    def replicas(self) -> Mapping[str, PoolReplicas]:
        """The replicas of each pool that is awake, by the fingerprint of its base model."""
        own, *all_others = pools_of(self._settings, self._catalogue())
        others = [pool for pool in all_others if not pool.asleep]
        reachable = {pool.engine.fingerprint: self._replicas_of(pool) for pool in others}
        return {own.engine.fingerprint: self.own, **reachable}

    def to_pool(self, pool: PoolSettings, forwarder: Forwarder, wakes: WakeQueue) -> OtherPool:
        return OtherPool(pool, self._host, self._replicas_of(pool).report, forwarder, wakes)

    def _replicas_of(self, pool: PoolSettings) -> PoolReplicas:
        return PoolReplicas(pool.application, self._settings.sync_timeout_s)
