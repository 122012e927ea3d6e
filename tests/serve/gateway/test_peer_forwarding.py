"""Two replicas with engines that have no model, each behind a real HTTP server of its own."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from serve.adapters.admission import Admission
from serve.adapters.pool import AdapterPool
from serve.adapters.publish import Control
from serve.adapters.reconcile import Reconciler, ReplicaReport
from serve.admin.routes import Admin
from serve.catalogue.adapter_store import AdapterStore
from serve.catalogue.log import CatalogueLog
from serve.deployment.uvicorn_patches import patch_uvicorn_startup
from serve.errors import ReplicaUnreachable
from serve.follower.http_client import direct_async_client
from serve.gateway.app import Gateway
from serve.gateway.peer_forwarding import Peers
from serve.settings import EngineSettings, GatewaySettings, ServeSettings
from tests.recording_proxy import RecordingProxy
from tests.serve.conftest import BASE, candidate, verify_nothing
from tests.serve.fakes import FakeEngine, respond

ADAPTERS = [candidate(f"adapter-{number}", "w") for number in range(4)]
FIRST, SECOND = ADAPTERS[:2]
# Of documentation: nothing is there. The replicas listen on loopback only, as those of a local server do.
MACHINE = "192.0.2.7"
CAPACITY = 2


@dataclass
class Replica:
    number: int
    engine: FakeEngine
    pool: AdapterPool
    reconciler: Reconciler
    peers: Peers
    url: str

    async def ask(self, name: str) -> str:
        """Which replica answered; it says so itself."""
        async with direct_async_client() as client:
            response = await client.post(f"{self.url}/v1/completions", json={"model": name, "stream": True})
        assert response.status_code == 200, response.text
        return response.text


@dataclass
class Fleet:
    replicas: list[Replica]
    reachable: bool = True
    asked: int = 0

    async def report(self) -> Sequence[ReplicaReport]:
        self.asked += 1
        if not self.reachable:
            raise ReplicaUnreachable("no answer")
        return [await replica.reconciler.report() for replica in self.replicas]


@pytest.fixture
async def fleet_beside_a_proxy(proxy: RecordingProxy, fleet: Fleet) -> tuple[Fleet, RecordingProxy]:
    """The replicas are started in the environment that names the proxy."""
    return fleet, proxy


@pytest.fixture
async def fleet(tmp_path: Path, log: CatalogueLog, store: AdapterStore) -> AsyncIterator[Fleet]:
    """Two replicas; each knows the address of the other, and neither holds an adapter."""
    for adapter in ADAPTERS:
        log.stage(adapter)
        log.promote(adapter)
    fleet = Fleet([])
    async with serving(0, fleet, log, store, tmp_path), serving(1, fleet, log, store, tmp_path):
        yield fleet


@asynccontextmanager
async def serving(number: int, fleet: Fleet, log: CatalogueLog, store: AdapterStore, root: Path) -> AsyncIterator[None]:
    engine = FakeEngine()

    async def say_who(scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        model = json.loads((await receive())["body"])["model"]
        assert model in {adapter.engine_name for adapter in engine.resident}
        await respond(send, 200, f"replica {number}, {model}, {headers.get(b'x-graft-caller', b'').decode()}".encode())

    engine.handler = say_who
    pool = AdapterPool(engine, store, CAPACITY)
    peers = Peers(f"replica-{number}", MACHINE, fleet.report)
    reconciler = Reconciler(f"replica-{number}", log, engine, pool, verify_nothing, address=lambda: peers.address)
    reconciler.catalogue = log.read()
    settings = ServeSettings(
        engine=EngineSettings(model_path=root, model_name="small-llama", fingerprint=BASE),
        gateway=GatewaySettings(admin_tokens={"admin": "0" * 64}),
        state_dir=root,
    )
    admin = Admin(
        settings.gateway.admin_tokens,
        settings.engine,
        settings.admission,
        Admission(settings.engine, settings.admission),
        store,
        Control(log, fleet),  # type: ignore[arg-type]
    )
    gateway = Gateway(settings, engine, pool, lambda: reconciler.catalogue, admin, peers=peers)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        patch_uvicorn_startup(f"replica-{number}", peers.listens_on)
        server = uvicorn.Server(uvicorn.Config(gateway, port=port, log_level="error", lifespan="off"))
        task = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started:  # noqa: ASYNC110  (uvicorn has no event for it)
            await asyncio.sleep(0.01)
        url = f"http://127.0.0.1:{port}"
        fleet.replicas.append(Replica(number, engine, pool, reconciler, peers, url))
        yield
        server.should_exit = True
        await task


async def fill(replica: Replica, *names: str) -> None:
    for name in names:
        await replica.ask(name)


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
