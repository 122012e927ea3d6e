"""The pools of a running server, from outside: their states, and requests meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx

from tests.e2e.conftest import Server
from tests.e2e.pools.test_pools import body_of

READY_S = 240


def pools_of(pools: Server) -> dict[str, dict[str, Any]]:
    listed = pools.command("pool", "list", "--json")
    assert listed.returncode == 0, listed.stderr
    return {pool["name"]: pool for pool in json.loads(listed.stdout)["pools"]}


def wait_for_state(pools: Server, name: str, state: str) -> dict[str, Any]:
    deadline = time.monotonic() + READY_S
    while (pool := pools_of(pools)[name])["state"] != state:
        assert time.monotonic() < deadline, pool
        time.sleep(1)
    return pool


@contextlib.asynccontextmanager
async def asking(pools: Server) -> AsyncIterator[list[int]]:
    """Asks the first pool without a pause until the block ends."""
    statuses: list[int] = []

    async def ask(client: httpx.AsyncClient) -> None:
        while True:
            response = await client.post(f"{pools.url}/v1/completions", json=body_of("french", max_tokens=4))
            statuses.append(response.status_code)

    # A connection for each request: one that is kept may be closed while a request is on its way.
    async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_keepalive_connections=0)) as client:
        task = asyncio.create_task(ask(client))
        yield statuses
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def until_status(pools: Server, model: str, status: int) -> None:
    deadline = time.monotonic() + READY_S
    async with httpx.AsyncClient(timeout=60) as client:
        while True:
            response = await client.post(f"{pools.url}/v1/completions", json=body_of(model))
            if response.status_code == status:
                return
            assert time.monotonic() < deadline, response.text
            await asyncio.sleep(0.2)
