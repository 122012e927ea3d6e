"""Replicas with engines that have no model, each behind a real HTTP server of its own."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from starlette.types import Receive, Scope, Send

from serve.adapters.admission import Admission
from serve.adapters.pool import AdapterPool
from serve.adapters.publish import Control
from serve.adapters.reconcile import Reconciler, ReplicaReport
from serve.admin.routes import Admin
from serve.catalogue.adapter_store import AdapterStore
from serve.catalogue.log import CatalogueLog
from serve.catalogue.storage.object_store import DirectoryStore
from serve.deployment.proxy.uvicorn_patches import patch_uvicorn_startup
from serve.errors import ReplicaUnreachable
from serve.follower.http_client import direct_async_client
from serve.gateway.app import Gateway
from serve.gateway.routing.peers import Peers
from serve.settings import EngineSettings, GatewaySettings, ServeSettings
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
        response = await self.response(name)
        assert response.status_code == 200, response.text
        return response.text

    async def response(self, name: str, path: str = "/v1/completions") -> httpx.Response:
        async with direct_async_client(timeout=60) as client:
            return await client.post(f"{self.url}{path}", json={"model": name, "stream": True})


@dataclass
class Fleet:
    log: CatalogueLog  # of whoever changes the catalogue; each replica has one of its own
    replicas: list[Replica] = field(default_factory=list)
    reachable: bool = True
    asked: int = 0
    earlier_reports: Sequence[ReplicaReport] | None = None  # given instead of those of now

    async def report(self) -> Sequence[ReplicaReport]:
        self.asked += 1
        if not self.reachable:
            raise ReplicaUnreachable("no answer")
        return self.earlier_reports or [await replica.reconciler.report() for replica in self.replicas]


@asynccontextmanager
async def fleet_of_two(store: AdapterStore, root: Path, **settings: Any) -> AsyncIterator[Fleet]:
    """Two replicas; each knows the address of the other, and neither holds an adapter. `settings`: of their
    gateways."""
    fleet = Fleet(CatalogueLog(DirectoryStore(root)))
    for adapter in ADAPTERS:
        fleet.log.stage(adapter)
        fleet.log.promote(adapter)
    async with serving(0, fleet, store, root, settings), serving(1, fleet, store, root, settings):
        yield fleet


@asynccontextmanager
async def serving(
    number: int, fleet: Fleet, store: AdapterStore, root: Path, gateway_settings: Mapping[str, Any]
) -> AsyncIterator[None]:
    engine, log = FakeEngine(), CatalogueLog(DirectoryStore(root))

    async def say_who(scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        model = json.loads((await receive())["body"])["model"]
        assert model in {adapter.engine_name for adapter in engine.resident}
        await respond(send, 200, f"replica {number}, {model}, {headers.get(b'x-graft-caller', b'').decode()}".encode())

    engine.handler = say_who
    pool = AdapterPool(engine, store, CAPACITY)
    peers = Peers(f"replica-{number}", MACHINE, fleet.report, lambda: reconciler.follow())
    reconciler = Reconciler(f"replica-{number}", log, engine, pool, verify_nothing, address=lambda: peers.address)
    reconciler.catalogue = log.read()
    settings = ServeSettings(
        engine=EngineSettings(model_path=root, model_name="small-llama", fingerprint=BASE),
        gateway=GatewaySettings.model_validate({"admin_tokens": {"admin": "0" * 64}} | dict(gateway_settings)),
        state_dir=root,
    )
    admin = Admin(
        settings.gateway.admin_tokens,
        settings.admission,
        Admission(lambda: [settings.engine], settings.admission),
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
        server.should_exit = server.force_exit = True
        await task


async def fill(replica: Replica, *names: str) -> None:
    for name in names:
        await replica.ask(name)
