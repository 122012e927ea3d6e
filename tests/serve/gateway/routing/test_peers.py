"""Two replicas with engines that have no model, each behind a real HTTP server of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from serve.catalogue.adapter_store import AdapterStore
from tests.recording_proxy import RecordingProxy
from tests.serve.fleet import ADAPTERS, FIRST, Fleet, fill, fleet_of_two


@pytest.fixture
async def fleet_beside_a_proxy(proxy: RecordingProxy, fleet: Fleet) -> tuple[Fleet, RecordingProxy]:
    """The replicas are started in the environment that names the proxy."""
    return fleet, proxy


@pytest.fixture
async def fleet(tmp_path: Path, store: AdapterStore) -> AsyncIterator[Fleet]:
    async with fleet_of_two(store, tmp_path) as fleet:
        yield fleet


async def test_a_cold_request_goes_to_the_replica_that_holds_its_adapter(fleet: Fleet) -> None:
    here, there = fleet.replicas
    await fill(there, "adapter-0")
    await fill(here, "adapter-2", "adapter-3")

    assert (await here.ask("adapter-0")).startswith(f"replica 1, {FIRST.adapter.engine_name}")

    assert here.engine.resident == {ADAPTERS[2].adapter, ADAPTERS[3].adapter}, "nothing was evicted"
    assert (here.peers.forwarded, there.peers.forwarded) == (1, 0)


async def test_a_forwarded_request_passes_no_proxy(fleet_beside_a_proxy: tuple[Fleet, RecordingProxy]) -> None:
    fleet, proxy = fleet_beside_a_proxy
    here, there = fleet.replicas
    await fill(there, "adapter-0")
    await fill(here, "adapter-2", "adapter-3")

    assert (await here.ask("adapter-0")).startswith("replica 1")
    assert proxy.first_lines == []


async def test_what_fits_here_is_loaded_here(fleet: Fleet) -> None:
    here, there = fleet.replicas
    await fill(there, "adapter-0")

    assert (await here.ask("adapter-0")).startswith("replica 0")


async def test_what_nobody_holds_is_loaded_here_even_if_another_one_has_to_leave(fleet: Fleet) -> None:
    here, _ = fleet.replicas
    await fill(here, "adapter-2", "adapter-3")

    assert (await here.ask("adapter-0")).startswith("replica 0")


async def test_a_busier_holder_is_left_alone(fleet: Fleet) -> None:
    here, there = fleet.replicas
    await fill(there, "adapter-0")
    await fill(here, "adapter-2", "adapter-3")
    there.engine.running_requests = 50

    assert (await here.ask("adapter-0")).startswith("replica 0")


async def test_a_forwarded_request_is_not_forwarded_again(fleet: Fleet) -> None:
    here, there = fleet.replicas
    await fill(there, "adapter-0")
    await fill(here, "adapter-2", "adapter-3")

    async with httpx.AsyncClient() as client:
        response = await client.post(
            f"{here.url}/v1/completions", json={"model": "adapter-0"}, headers={"x-graft-forwarded": "replica-0"}
        )

    assert response.text.startswith("replica 0")


async def test_a_replica_that_was_not_meant_does_not_answer(fleet: Fleet) -> None:
    """A port is given away again: there may be a replica of another server behind it."""
    here, there = fleet.replicas
    await fill(there, "adapter-0")
    await fill(here, "adapter-2", "adapter-3")
    there.peers.replica = "replica-of-another-server"

    assert (await here.ask("adapter-0")).startswith("replica 0")


async def test_a_holder_that_died_is_done_without(fleet: Fleet) -> None:
    here, there = fleet.replicas
    await fill(there, "adapter-0")
    await fill(here, "adapter-2", "adapter-3")
    there.peers.address = "127.0.0.1:1"

    assert (await here.ask("adapter-0")).startswith("replica 0")


async def test_replicas_that_can_not_be_asked_are_done_without(fleet: Fleet) -> None:
    here, there = fleet.replicas
    await fill(there, "adapter-0")
    await fill(here, "adapter-2", "adapter-3")
    fleet.reachable = False

    assert (await here.ask("adapter-0")).startswith("replica 0")


async def test_the_others_are_asked_at_most_once_a_second_and_only_when_it_matters(fleet: Fleet) -> None:
    here, there = fleet.replicas
    await fill(there, "adapter-0")
    await fill(here, "adapter-2", "adapter-3", "adapter-2")
    assert fleet.asked == 0

    await asyncio.gather(*(here.ask("adapter-0") for _ in range(20)))

    assert fleet.asked == 1


async def test_the_callers_headers_arrive(fleet: Fleet) -> None:
    here, there = fleet.replicas
    await fill(there, "adapter-0")
    await fill(here, "adapter-2", "adapter-3")

    async with httpx.AsyncClient() as client:
        response = await client.post(
            f"{here.url}/v1/completions", json={"model": "adapter-0"}, headers={"x-graft-caller": "me"}
        )

    assert response.text.endswith(", me")
    assert response.headers.get_list("x-graft-model") == [FIRST.adapter.engine_name]
    assert response.headers["content-type"] == "application/json"
    assert [len(response.headers.get_list(name)) for name in ("date", "server")] == [1, 1]
