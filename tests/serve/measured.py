"""A gateway whose metrics and log lines tests can read, in front of an engine without a model."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from starlette.types import Receive, Scope, Send

from serve.adapters.admission import Admission
from serve.adapters.change_events import ReportingControl
from serve.adapters.pool import AdapterPool
from serve.adapters.reconcile import Reconciler
from serve.adapters.slot_scheduler import WaitLimits
from serve.admin.routes import Admin
from serve.catalogue.adapter_store import AdapterStore
from serve.catalogue.log import CatalogueLog
from serve.deployment.metrics_collector import MetricsCollector
from serve.gateway.app import Gateway
from serve.gateway.request_policy import RequestPolicy
from serve.observability.logs import JsonLines
from serve.observability.recorder import MetricsRecorder
from serve.settings import EngineSettings, GatewaySettings, LogSettings, MetricsSettings, ServeSettings
from serve.settings.admin_tokens import sha256
from tests.serve.conftest import BASE, candidate, verify_nothing
from tests.serve.fakes import FakeEngine
from tests.serve.one_replica import OneReplica

PIRATE, ZEPHYR = candidate("pirate", "one"), candidate("zephyr", "two")
KEY = "sk-a-very-secret-key"


@dataclass
class Server:
    client: httpx.AsyncClient
    engine: FakeEngine
    recorder: MetricsRecorder
    snapshot: MetricsCollector
    pool: AdapterPool
    control: ReportingControl
    policy: RequestPolicy
    logs: list[str]

    async def ask(self, model: str, **headers: str) -> httpx.Response:
        body = json.dumps({"model": model, "prompt": "a secret prompt"})
        return await self.client.post(
            "/v1/completions", content=body, headers={"authorization": f"Bearer {KEY}", **headers}
        )

    def samples(self, name: str) -> dict[tuple[str, ...], float]:
        """Values by those labels that are not the same for all."""
        text = generate_latest(self.snapshot).decode()
        return {
            tuple(value for label, value in sorted(sample.labels.items()) if label not in ("model_name", "route")): (
                sample.value
            )
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name
        }

    def lines(self, event: str) -> list[dict[str, Any]]:
        return [line for line in map(json.loads, self.logs) if line.get("event") == event]


class KeptLines(logging.Handler):
    def __init__(self, lines: list[str]) -> None:
        super().__init__()
        self._lines = lines
        self.setFormatter(JsonLines(replica="one"))

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(self.format(record))


@pytest.fixture
def logs() -> Iterator[list[str]]:
    lines: list[str] = []
    handler, logger = KeptLines(lines), logging.getLogger("serve")
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.fixture
async def server(
    engine: FakeEngine, log: CatalogueLog, store: AdapterStore, tmp_path: Path, logs: list[str]
) -> AsyncIterator[Server]:
    for one in (PIRATE, ZEPHYR):
        log.stage(one)
        log.promote(one)
    settings = ServeSettings(
        engine=EngineSettings(model_path=tmp_path, model_name="small-llama", fingerprint=BASE),
        gateway=GatewaySettings(admin_tokens={"admin": sha256("token")}),
        log=LogSettings(access_sample=1),
        metrics=MetricsSettings(requests_info=True),
        state_dir=tmp_path,
    )
    recorder = MetricsRecorder(settings.metrics.max_adapters)
    pool = AdapterPool(engine, store, 1, limits=WaitLimits(max_waiting=1, turn_s=0.01), events=recorder)
    reconciler = Reconciler("one", log, engine, pool, verify_nothing, events=recorder)
    await reconciler.sync()
    control = ReportingControl(log, OneReplica(reconciler), events=recorder)
    admission = Admission(lambda: [settings.engine], settings.admission)
    admin = Admin(settings.gateway.admin_tokens, settings.admission, admission, store, control)
    gateway = Gateway(settings, engine, pool, lambda: reconciler.catalogue, admin, recorder=recorder)
    snapshot = MetricsCollector(settings, recorder, engine, pool, reconciler, bodies=gateway.policy.bodies)
    transport = httpx.ASGITransport(gateway, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://graft") as client:
        yield Server(client, engine, recorder, snapshot, pool, control, gateway.policy, logs)


async def stream(scope: Scope, receive: Receive, send: Send) -> None:
    await receive()
    headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await asyncio.sleep(0.01)
    await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})
