"""Faults of a second pool, a merged model that was added while the server runs. Requests for both pools go on."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from benchmarks.faults.testbed import POOL, Testbed

_UNREADABLE_S = 10.0
_PAUSE_S = 5.0
_READY_TIMEOUT_S = 240.0
_POLL_S = 0.5


async def add_pool(testbed: Testbed) -> None:
    """Add the pool, and have callers ask it from now on."""
    await _add(testbed)
    await _until_running(testbed)
    await testbed.expect(POOL)


async def is_running(testbed: Testbed) -> bool:
    pools = (await testbed.admin("GET", "pools"))["pools"]
    return any(pool["name"] == POOL and pool["state"] == "running" for pool in pools)


async def engine_killed(testbed: Testbed) -> None:
    """Kills the engine of the added pool. Nobody else can answer for its model; the other pool is not concerned."""
    testbed.processes("pool engine")[0].kill()


async def model_unreadable(testbed: Testbed) -> float:
    """Kills the engine of the added pool, whose model can't be read while it starts again."""
    model, hidden = testbed.artifacts[POOL] / "model", testbed.home / "hidden"
    model.rename(hidden)
    testbed.processes("pool engine")[0].kill()
    await asyncio.sleep(_UNREADABLE_S)
    hidden.rename(model)
    return time.monotonic()


async def removed_and_added_by_two(testbed: Testbed) -> float:
    """Removes the added pool while it is asked; then two administrators add it at the same time."""
    testbed.expected.removed.add(POOL)
    await testbed.admin("DELETE", f"pools/{POOL}")
    await asyncio.sleep(_PAUSE_S)
    before = testbed.state.log.read().epoch
    await asyncio.gather(_add(testbed), _add(testbed))
    if (entries := testbed.state.log.read().epoch - before) != 1:
        raise RuntimeError(f"two administrators wrote {entries} entries for one pool")
    added = time.monotonic()
    await _until_running(testbed)
    testbed.expected.removed.clear()
    return added


async def map_is_old(testbed: Testbed) -> None:
    """Stops the process that tells the proxy which pool has which name, and publishes a new name meanwhile."""
    assert testbed.server
    process = testbed.main_process()
    process.suspend()
    try:
        await testbed.add("second", f"late-{testbed.state.log.read().epoch}")
        await asyncio.sleep(_PAUSE_S)
    finally:
        process.resume()


async def _add(testbed: Testbed) -> Any:
    return await testbed.admin("POST", "pools", {"path": str(testbed.artifacts[POOL])})


async def _until_running(testbed: Testbed) -> None:
    async with asyncio.timeout(_READY_TIMEOUT_S):
        while not await is_running(testbed):  # noqa: ASYNC110  (another process decides it)
            await asyncio.sleep(_POLL_S)
