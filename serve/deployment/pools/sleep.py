"""Puts a pool to sleep that nobody has asked for a while."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from datetime import UTC, datetime

from serve.catalogue.added_pool import AddedPool
from serve.catalogue.catalogue import Catalogue
from serve.catalogue.entry import Audit
from serve.catalogue.log import CatalogueLog
from serve.catalogue.pool_changes import sleep_pool
from serve.errors import ServeError
from serve.gateway.routing.peers import FetchReports
from serve.observability.open_requests import OpenRequests
from serve.settings import PoolSettings

_POLL_S = 0.5

logger = logging.getLogger(__name__)


async def sleep_when_idle(
    pool: PoolSettings,
    log: CatalogueLog,
    catalogue: Callable[[], Catalogue],
    requests: OpenRequests,
    fetch_reports: FetchReports,
) -> None:
    """Watches one replica of the pool: after `sleep_after_s` without a request it asks the others, and records that
    the pool sleeps if all agree. `catalogue`: this replica's copy. Never returns, but at once for a pool that does not
    sleep."""
    if (after_s := pool.sleep_after_s) is None:
        return
    why = f"no request for {after_s:g} s"
    while True:
        await asyncio.sleep(_POLL_S)
        awake = catalogue().pools.get(pool.engine.model_name)
        if awake is None or _idle_s(awake, requests) < after_s:
            continue
        try:
            if all(report.idle_s >= after_s for report in await fetch_reports()) and requests.idle_s >= after_s:
                await asyncio.to_thread(sleep_pool, log, awake, Audit("graft", why))
        except (ServeError, TimeoutError):  # a replica or the catalogue can't be reached, which may be over soon
            logger.debug("could not put the pool to sleep", exc_info=True)


def _idle_s(pool: AddedPool, requests: OpenRequests) -> float:
    """A replica that is being stopped has no requests, and must not end the waking that follows."""
    woken_s = (datetime.now(UTC) - pool.woken_at).total_seconds() if pool.woken_at else math.inf
    return min(requests.idle_s, woken_s)
