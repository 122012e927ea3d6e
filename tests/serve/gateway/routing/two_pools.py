"""Two pools of one replica each, behind real HTTP servers: a base model with an adapter, and a merged model."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
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
from serve.catalogue.entry import Audit
from serve.catalogue.log import CatalogueLog
from serve.catalogue.pool_changes import wake_pool
from serve.catalogue.storage.object_store import DirectoryStore
from serve.errors import ReplicaUnreachable
from serve.follower.http_client import direct_async_client
from serve.gateway.app import Gateway
from serve.gateway.public_routes import ENGINE_ROUTES
from serve.gateway.routing.forwarding import Forwarder
from serve.gateway.routing.other_pool import OtherPool
from serve.gateway.routing.other_pools import OtherPools
from serve.gateway.routing.peers import Peers
from serve.gateway.routing.wake_queue import WakeQueue
from serve.settings import EngineSettings, GatewaySettings, PoolSettings, ServeSettings
from tests.serve.conftest import BASE, candidate, verify_nothing
from tests.serve.fakes import FakeEngine, respond

PIRATE = candidate("pirate", "weights")
MERGED = "c" * 64
HOST = "127.0.0.1"


@dataclass
class Replica:
    settings: ServeSettings
    engine: FakeEngine = field(default_factory=FakeEngine)
    log: CatalogueLog = field(init=False)
    reconciler: Reconciler = field(init=False)
    peers: Peers = field(init=False)
    reachable: bool = True
    woken: list[str] = field(default_factory=list)  # the pools that this replica has woken
    given_up: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.settings.engine.model_name

    @property
    def url(self) -> str:
        return f"http://{self.peers.address}{self.settings.route_prefix.rstrip('/')}"

    async def report(self) -> Sequence[ReplicaReport]:
        if not self.reachable:
            raise ReplicaUnreachable("no answer")
        return [await self.reconciler.report()]

    async def wake(self, name: str) -> datetime:
        self.woken.append(name)
        woken = wake_pool(self.log, name, Audit()).pools[name]
        assert woken.woken_at
        return woken.woken_at

    async def give_up(self, name: str) -> None:
        self.given_up.append(name)

    async def ask(self, model: str | None, path: str = "/v1/completions", **headers: str) -> httpx.Response:
        async with direct_async_client(timeout=60) as client:
            body = {"prompt": "hi"} if model is None else {"model": model}
            return await client.post(f"{self.url}{path}", json=body, headers=headers)

    async def get_status(self, path: str) -> int:
        async with direct_async_client(timeout=60) as client:
            return (await client.get(f"{self.url}{path}")).status_code

    async def get(self, path: str) -> Any:
        async with direct_async_client(timeout=60) as client:
            return (await client.get(f"{self.url}{path}")).json()


@asynccontextmanager
async def two_pools(
    store: AdapterStore,
    root: Path,
    first_offers: Sequence[str] = ENGINE_ROUTES,
    *,
    second_is_added: bool = False,
    **gateway: Any,
) -> AsyncIterator[tuple[Replica, Replica]]:
    """The pool of `small-llama` with `pirate`, and that of the merged model `ticket`. `first_offers`: the routes of the
    first engine; `second_is_added`: the server was started with the first one; `gateway`: settings."""
    log = CatalogueLog(DirectoryStore(root))
    log.stage(PIRATE)
    log.promote(PIRATE)
    pools = [
        PoolSettings(engine=EngineSettings(model_path=root, model_name="small-llama", fingerprint=BASE)),
        PoolSettings(
            engine=EngineSettings(model_path=root, model_name="ticket", fingerprint=MERGED, max_lora_rank=0),
            application="graft-ticket",
            route_prefix="/pools/ticket",
        ),
    ]
    given = pools[:1] if second_is_added else pools
    first, second = (Replica(_settings(pool, given, root, gateway)) for pool in pools)
    first.engine.routes = tuple(first_offers)
    async with _serving(first, second, store, root), _serving(second, first, store, root):
        yield first, second


def _settings(pool: PoolSettings, pools: Sequence[PoolSettings], root: Path, gateway: dict[str, Any]) -> ServeSettings:
    return ServeSettings(
        **pool.model_dump(),
        gateway=GatewaySettings.model_validate({"admin_tokens": {"admin": "0" * 64}} | gateway),
        state_dir=root,
        other_pools=tuple(other for other in pools if other is not pool),
    )


@asynccontextmanager
async def _serving(replica: Replica, other: Replica, store: AdapterStore, root: Path) -> AsyncIterator[None]:
    settings, engine = replica.settings, replica.engine
    base = settings.engine

    async def say_who(scope: Scope, receive: Receive, send: Send) -> None:
        model = json.loads((await receive())["body"]).get("model")
        await respond(send, 200, json.dumps({"pool": base.model_name, "model": model, "path": scope["path"]}).encode())

    engine.handler = say_who
    replica.log = CatalogueLog(DirectoryStore(root))
    pool = AdapterPool(engine, store, capacity=4)
    replica.reconciler = Reconciler(
        base.model_name, replica.log, engine, pool, verify_nothing, base=base.fingerprint, base_name=base.model_name,
        address=lambda: replica.peers.address,
    )  # fmt: skip
    forwarder = Forwarder()
    wakes = WakeQueue(replica, settings.gateway.max_waiting_requests, settings.gateway.max_wake_s)
    replica.peers = Peers(base.model_name, HOST, replica.report, replica.reconciler.follow, forwarder=forwarder)
    await replica.reconciler.sync()
    admin = Admin(
        settings.gateway.admin_tokens,
        settings.admission,
        Admission(lambda: [pool.engine for pool in (settings, *settings.other_pools)], settings.admission),
        store,
        Control(replica.log, None),  # type: ignore[arg-type]  # nothing is published
    )
    gateway = Gateway(
        settings, engine, pool, lambda: replica.reconciler.catalogue, admin, peers=replica.peers,
        other_pools=OtherPools(
            settings,
            lambda: replica.reconciler.catalogue,
            lambda known: OtherPool(known, HOST, other.report, forwarder, wakes),
        ),
    )  # fmt: skip

    async def as_ray_calls_it(scope: Scope, receive: Receive, send: Send) -> None:
        if not scope["path"].startswith(settings.route_prefix):
            await respond(send, 404, b"Ray Serve: not the prefix of this application")
            return
        await gateway({**scope, "root_path": settings.route_prefix.rstrip("/")}, receive, send)

    with socket.socket() as listener:
        listener.bind((HOST, 0))
        replica.peers.listens_on(listener.getsockname()[1])
        server = uvicorn.Server(uvicorn.Config(as_ray_calls_it, log_level="error", lifespan="off"))
        task = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started:  # noqa: ASYNC110  (uvicorn has no event for it)
            await asyncio.sleep(0.01)
        yield
        server.should_exit = server.force_exit = True
        await task
