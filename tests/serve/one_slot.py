"""A gateway whose engine, which has no model, has one adapter slot, so that requests of different adapters wait."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from serve.adapters.pool import AdapterPool
from serve.adapters.publish import Control
from serve.adapters.reconcile import Reconciler
from serve.adapters.rollout import Rollouts
from serve.adapters.slot_scheduler import WaitLimits
from serve.admin.routes import Admin
from serve.catalogue.adapter_store import AdapterStore
from serve.catalogue.catalogue import Catalogue
from serve.catalogue.entry import Audit, Entry
from serve.catalogue.log import CatalogueLog
from serve.gateway.app import Gateway
from serve.settings import EngineSettings, GatewaySettings, ServeSettings
from serve.settings.admin_tokens import sha256
from tests.serve.conftest import candidate, verify_nothing
from tests.serve.fakes import FakeEngine, respond
from tests.serve.one_replica import OneReplica, Unchecked

TOKEN = "the admin token"
ADMIN = {"authorization": f"Bearer {TOKEN}"}
OLD, NEW = candidate("pirate", "old"), candidate("pirate", "new")
# An idle slot is kept for its adapter for as long as loading it took, but not beyond the turn. Answers that take a
# whole turn leave a slot that another adapter, a shadow included, gets at once.
TURN_S = 0.05
LIMITS = WaitLimits(max_waiting=4, max_waiting_per_caller=2, max_wait_s=0.3, turn_s=TURN_S)


def registered(count: int) -> Catalogue:
    """So many aliases, each published once."""
    adapters = [candidate(f"adapter-{number:05}", "w") for number in range(count)]
    return Catalogue().after(
        *(Entry.now(verb, adapter, Audit()) for adapter in adapters for verb in ("stage", "promote"))  # type: ignore[arg-type]
    )


class Replica:
    def __init__(
        self,
        engine: FakeEngine,
        store: AdapterStore,
        root: Path,
        log: CatalogueLog,
        limits: WaitLimits,
        max_output_tokens: int | None = None,
    ) -> None:
        self.engine = engine
        self.pool = AdapterPool(engine, store, capacity=3, slots=1, limits=limits)
        self.rollouts = Rollouts(self._give_up)
        self.reconciler = Reconciler(
            "replica-1", log, engine, self.pool, verify_nothing, keep_previous=0, splits=self.rollouts.summaries
        )
        settings = ServeSettings(
            engine=EngineSettings(model_path=root, model_name="small-llama", fingerprint="b" * 64),
            gateway=GatewaySettings(admin_tokens={"admin": sha256(TOKEN)}, max_output_tokens=max_output_tokens),
            state_dir=root,
        )
        self.admin = Admin(
            settings.gateway.admin_tokens,
            settings.admission,
            Unchecked([settings.engine], settings.admission),
            store,
            Control(log, OneReplica(self.reconciler)),
        )
        self.gateway = Gateway(
            settings, engine, self.pool, lambda: self.reconciler.catalogue, self.admin, self.rollouts
        )

    async def _give_up(self, *args: object) -> None:
        await self.admin.give_up(*args)  # type: ignore[arg-type]

    @asynccontextmanager
    async def client(self) -> AsyncIterator[httpx.AsyncClient]:
        transport = httpx.ASGITransport(self.gateway, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://graft", timeout=30) as client:
            yield client


@pytest.fixture
def replica(engine: FakeEngine, store: AdapterStore, tmp_path: Path, log: CatalogueLog) -> Replica:
    return Replica(engine, store, tmp_path, log, LIMITS)


async def until(happened: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not happened():  # noqa: ASYNC110  (whatever it is, it has no event)
            await asyncio.sleep(0.001)


def completion(text: str) -> bytes:
    return json.dumps({"choices": [{"text": text}]}).encode()


async def say_your_name(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with the engine name it was asked for, after a moment."""
    model = json.loads((await receive())["body"])["model"]
    await asyncio.sleep(0.005)
    await respond(send, 200, completion(model))


async def published(replica: Replica, log: CatalogueLog) -> None:
    """`pirate` is NEW, and was OLD."""
    for adapter in (OLD, NEW):
        log.stage(adapter)
        log.promote(adapter)
    await replica.reconciler.sync()
