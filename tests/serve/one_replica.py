"""A gateway with one replica behind it, whose engine has no model: one adapter is published, another at hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import httpx

from serve.adapters.admission import Admission, incompatibilities
from serve.adapters.pool import AdapterPool
from serve.adapters.publish import Control
from serve.adapters.reconcile import Reconciler, ReplicaReport
from serve.admin.routes import Admin
from serve.catalogue.adapter_store import AdapterStore
from serve.catalogue.candidate import Candidate
from serve.catalogue.log import CatalogueLog
from serve.catalogue.storage.object_store import DirectoryStore
from serve.errors import AdapterRejected
from serve.gateway.app import Gateway
from serve.settings import EngineSettings, GatewaySettings, ServeSettings
from serve.settings.admin_tokens import sha256
from tests.serve.conftest import BASE, candidate, verify_nothing
from tests.serve.fakes import FakeEngine

OLD, NEW = candidate("pirate", "old"), candidate("pirate", "new")
TOKEN = "the admin token"
ADMIN = {"authorization": f"Bearer {TOKEN}"}
MAX_BODY_BYTES = 1000


class OneReplica:
    def __init__(self, reconciler: Reconciler) -> None:
        self._reconciler = reconciler

    async def sync(self, awaited: str | None = None, base: str | None = None) -> Sequence[ReplicaReport]:
        return [await self._reconciler.sync(awaited)]


class Unchecked(Admission):
    """The files of these adapters are empty."""

    def check(self, candidate: Candidate, directory: Path) -> None:
        if reasons := incompatibilities(candidate, self._engines):
            raise AdapterRejected("; ".join(reasons))


class NamedOnly(AdapterStore):
    """A directory of the right name will do."""

    def _is_intact(self, path: Path) -> bool:
        return path.is_dir()


async def gateway_of(engine: FakeEngine, store: AdapterStore, root: Path) -> Gateway:
    log = CatalogueLog(DirectoryStore(root))
    log.stage(OLD)
    log.promote(OLD)
    settings = ServeSettings(
        engine=EngineSettings(model_path=root, model_name="small-llama", fingerprint=BASE, max_lora_rank=16),
        gateway=GatewaySettings(max_body_bytes=MAX_BODY_BYTES, admin_tokens={"admin": sha256(TOKEN)}),
        state_dir=root,
    )
    pool = AdapterPool(engine, store, capacity=2)
    reconciler = Reconciler("replica-1", log, engine, pool, verify_nothing)
    await reconciler.sync()
    (root / NEW.revision).mkdir()
    admin = Admin(
        settings.gateway.admin_tokens,
        settings.admission,
        Unchecked([settings.engine], settings.admission),
        NamedOnly(root, DirectoryStore(root)),
        Control(log, OneReplica(reconciler)),
    )
    return Gateway(settings, engine, pool, lambda: reconciler.catalogue, admin)


def calling(gateway: Gateway) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(gateway, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://graft")
