"""Starts and stops the pools that the catalogue adds and removes, from the server's own process."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from serve.catalogue.catalogue import Catalogue
from serve.catalogue.log import CatalogueLog
from serve.catalogue.pool_changes import pools_of
from serve.settings import PoolSettings, ServeSettings

logger = logging.getLogger(__name__)


class PoolController:
    """Gives Ray Serve the applications of all pools that are awake whenever the catalogue's pools have changed."""

    def __init__(
        self, given: Sequence[ServeSettings], log: CatalogueLog, deploy: Callable[[Sequence[ServeSettings]], None]
    ) -> None:
        """`given`: the pools that the server was started with, which run already. `deploy` starts the applications that
        do not run yet, stops those that are not in its list, and leaves those as they are whose settings are the
        same."""
        self._given = given
        self._log = log
        self._deploy = deploy
        self._catalogue = Catalogue()
        self._deployed: Mapping[str, Any] = self._catalogue.pools

    def update(self) -> None:
        """Follow the catalogue. Raises StoreUnavailable if it can't be read; what Ray Serve raises, is tried again by
        the next call."""
        self._catalogue = self._log.follow(self._catalogue)
        if self._catalogue.pools == self._deployed:
            return
        added = pools_of(self._given[0], self._catalogue)[len(self._given) :]
        awake = [pool for pool in added if not pool.asleep]
        logger.info("the added pools that run are %s", ", ".join(pool.engine.model_name for pool in awake) or "none")
        self._deploy([*self._given, *(settings_of_added(pool, self._given) for pool in awake)])
        self._deployed = self._catalogue.pools


def settings_of_added(pool: PoolSettings, given: Sequence[ServeSettings]) -> ServeSettings:
    """An added pool with what all pools of the server share."""
    first = given[0]
    return first.model_copy(
        update={
            **{name: getattr(pool, name) for name in PoolSettings.model_fields},
            "other_pools": tuple(pool_of(settings) for settings in given),
            # Ray was started with a CPU for each engine that there was then, and has no more to give. It only counts
            # them: all engines share the machine.
            "cpus_per_replica": 0.0,
            # Of the catalogue: replicas would be restarted when they change.
            "asleep": False,
            "woken_at": None,
        }
    )


def pool_of(settings: ServeSettings) -> PoolSettings:
    """The pool without what all pools share."""
    return PoolSettings(**{name: getattr(settings, name) for name in PoolSettings.model_fields})
