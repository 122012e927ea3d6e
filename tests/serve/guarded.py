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

from serve import key_writing
from serve.admin import Admin
from serve.admission import Admission
from serve.config import EngineSettings, GatewaySettings, ServeSettings
from serve.gateway import Gateway
from serve.keys import Key, KeyFile
from serve.ledger import Ledgers
from serve.log import CatalogueLog
from serve.objects import Directory
from serve.passage import Passages
from serve.publish import Control
from serve.reconcile import Reconciler
from serve.residency import AdapterPool
from serve.state import sha256
from serve.store import AdapterStore
from serve.tokens import counter
from serve.usage import Meter
from tests.serve.conftest import BASE, believe, candidate
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
        made = key_writing.create(self.keys, lambda it: Key.model_validate({"id": key_id, "secrets": it, **fields}))
        self.secrets[key_id] = made
        return bearer(made)


def bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


def ask(model: str | None = BASE_MODEL, tokens: int = 4, **fields: Any) -> dict[str, Any]:
    return {"model": model, "prompt": "hi", "max_tokens": tokens} | fields


def code(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


async def guarded_gateway(
    home: Path, store: AdapterStore, engine: FakeEngine, ledgers: Ledgers | None = None, **settings: Any
) -> Guarded:
    keys = home / "keys.json"
    if not keys.exists():
        keys.write_text(KeyFile().model_dump_json())
    log = CatalogueLog(Directory(home))
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
    reconciler = Reconciler("replica-1", log, engine, pool, believe)
    await reconciler.sync()
    admission = Admission(all_settings.engine, all_settings.admission)
    admin = Admin(
        gateway_settings.admin_tokens,
        all_settings.engine,
        all_settings.admission,
        admission,
        AdapterStore(home, Directory(home)),
        Control(log, OneReplica(reconciler)),
    )
    meter = Meter(Directory(home), flush_s=60)
    passages = Passages(gateway_settings, engine, ledgers, meter)
    gateway = Gateway(all_settings, engine, pool, lambda: reconciler.catalogue, admin, passages=passages)
    return Guarded(gateway, engine, keys, meter, log)


async def until(holds: Callable[[], bool], timeout_s: float = 20) -> None:
    """Looks again and again; fails if it never holds."""
    async with asyncio.timeout(timeout_s):
        while not holds():  # noqa: ASYNC110  (there is no event: it is the state that is tested)
            await asyncio.sleep(0.01)


async def generate(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with 3 prompt tokens and as many others as were asked for (default 4), and has them counted."""
    body = json.loads((await receive())["body"])
    tokens = body.get("max_tokens") or body.get("max_completion_tokens") or 4
    if counted := counter():
        counted.prompt += 3
        counted.completion += tokens
    await respond(send, 200, json.dumps({"usage": {"total_tokens": 3 + tokens}, "asked": body}).encode())
