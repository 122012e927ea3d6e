"""All other pools of the server, as this replica's copy of the catalogue knows them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from serve.catalogue.added_pool import AddedPool
from serve.catalogue.catalogue import Catalogue
from serve.catalogue.pool_changes import pools_of
from serve.gateway.routing.other_pool import OtherPool
from serve.settings import PoolSettings, ServeSettings


class OtherPools:
    """The pools that the server was started with, and those that were added since."""

    def __init__(
        self,
        settings: ServeSettings,
        catalogue: Callable[[], Catalogue],
        connect: Callable[[PoolSettings], OtherPool] | None,
    ) -> None:
        """`connect` makes a pool reachable for this replica; without it there is no other one."""
        self._settings = settings
        self._catalogue = catalogue
        self._connect = connect
        self._seen: Mapping[str, AddedPool] | None = None  # the catalogue's pools of which `_pools` was made
        self._pools: Sequence[OtherPool] = ()
        self._by_name: Mapping[str, OtherPool] = {}
        self._by_base: Mapping[str, OtherPool] = {}

    def all(self) -> Sequence[OtherPool]:
        self._follow()
        return self._pools

    def named(self, name: str) -> OtherPool | None:
        """The pool whose base model or merged model has this name."""
        self._follow()
        return self._by_name.get(name)

    def of_base(self, fingerprint: str) -> OtherPool | None:
        self._follow()
        return self._by_base.get(fingerprint)

    def _follow(self) -> None:
        catalogue = self._catalogue()
        if self._connect is None or catalogue.pools is self._seen:
            return
        known = {pool.settings: pool for pool in self._pools}
        wanted = pools_of(self._settings, catalogue)[1:]
        self._pools = [known.get(settings) or self._connect(settings) for settings in wanted]
        self._by_name = {pool.name: pool for pool in self._pools}
        self._by_base = {pool.base: pool for pool in self._pools}
        self._seen = catalogue.pools
