"""A gateway that knows its callers, in front of an engine without a model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from starlette.types import Receive, Scope, Send

from serve.adapters.admission import Admission
from serve.adapters.pool import AdapterPool
from serve.adapters.publish import Control
from serve.adapters.reconcile import Reconciler
from serve.admin.routes import Admin
from serve.callers import key_admin
from serve.callers.keys import Key, KeyFile
from serve.callers.ledger import RateLimitBackend
from serve.callers.usage import Meter
from serve.catalogue.adapter_store import AdapterStore
from serve.catalogue.log import CatalogueLog
from serve.catalogue.storage.object_store import DirectoryStore
from serve.engine.token_counter import current_counter
from serve.gateway.app import Gateway
from serve.gateway.request_policy import RequestPolicy
from serve.settings import EngineSettings, GatewaySettings, ServeSettings
from serve.settings.admin_tokens import sha256
from tests.serve.conftest import BASE, candidate, verify_nothing
from tests.serve.fakes import FakeEngine, respond
from tests.serve.one_replica import OneReplica

BASE_MODEL = "small-llama"
PATH = "/v1/completions"
ADMIN_TOKEN = "the admin token"
ADAPTERS = [candidate(name, name) for name in ("french", "german", "secret-plan")]


@dataclass
class Guarded:
    """The gateway and what is around it."""

    gateway: Gateway
    engine: FakeEngine
    keys: Path
    meter: Meter
    log: CatalogueLog
    secrets: dict[str, str] = field(default_factory=dict)

    def key(self, key_id: str, **fields: Any) -> dict[str, str]:
        """A new key, as headers."""
        secret = key_admin.create(
            self.keys, lambda secrets: Key.model_validate({"id": key_id, "secrets": secrets, **fields})
        )
        self.secrets[key_id] = secret
        return bearer(secret)


def bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


def ask(model: str | None = BASE_MODEL, tokens: int = 4, **fields: Any) -> dict[str, Any]:
    return {"model": model, "prompt": "hi", "max_tokens": tokens} | fields


def code(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


async def guarded_gateway(
    home: Path, store: AdapterStore, engine: FakeEngine, rate_limits: RateLimitBackend | None = None, **settings: Any
) -> Guarded:
    keys = home / "keys.json"
    if not keys.exists():
        keys.write_text(KeyFile().model_dump_json())
    log = CatalogueLog(DirectoryStore(home))
    for adapter in ADAPTERS:
        if not log.read().was_promoted(adapter.adapter):
            log.stage(adapter)
            log.promote(adapter)
    gateway_settings = GatewaySettings.model_validate(
        {"admin_tokens": {"admin": sha256(ADMIN_TOKEN)}, "keys_file": keys} | settings
    )
    all_settings = ServeSettings(
        engine=EngineSettings(model_path=home, model_name=BASE_MODEL, fingerprint=BASE, max_lora_rank=16),
        gateway=gateway_settings,
        state_dir=home,
    )
    pool = AdapterPool(engine, store, capacity=4)
    reconciler = Reconciler("replica-1", log, engine, pool, verify_nothing)
    await reconciler.sync()
    admission = Admission(lambda: [all_settings.engine], all_settings.admission)
    admin = Admin(
        gateway_settings.admin_tokens,
        all_settings.admission,
        admission,
        AdapterStore(home, DirectoryStore(home)),
        Control(log, OneReplica(reconciler)),
    )
    meter = Meter(DirectoryStore(home), flush_s=60)
    policy = RequestPolicy(gateway_settings, engine, rate_limits, meter)
    gateway = Gateway(all_settings, engine, pool, lambda: reconciler.catalogue, admin, policy=policy)
    return Guarded(gateway, engine, keys, meter, log)


async def until(holds: Callable[[], bool], timeout_s: float = 120) -> None:
    """Looks again and again; fails if it never holds."""
    async with asyncio.timeout(timeout_s):
        while not holds():  # noqa: ASYNC110  (there is no event: it is the state that is tested)
            await asyncio.sleep(0.01)


async def generate(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with 3 prompt tokens and as many others as were asked for (default 4), and has them counted."""
    body = json.loads((await receive())["body"])
    tokens = body.get("max_tokens") or body.get("max_completion_tokens") or 4
    if counted := current_counter():
        counted.prompt += 3
        counted.completion += tokens
    await respond(send, 200, json.dumps({"usage": {"total_tokens": 3 + tokens}, "asked": body}).encode())
