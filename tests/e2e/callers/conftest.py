"""Two real replicas that ask callers for keys."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from examples.server import running_server
from serve.callers import key_admin
from serve.callers.keys import Key, KeyFile
from serve.catalogue.state_dir import StateDir
from serve.deployment.ports import free_port
from serve.settings import Allowance, GatewaySettings
from tests.e2e.conftest import ENGINE_OPTIONS, REPLICAS, SLOT_OPTIONS, Server, Story

PATH = "/v1/completions"
LONG = 1500  # tokens: seconds
MAX_RUNNING = 4  # requests of callers in the engine of each replica, which has one more place for checks
LEASE_S: float = GatewaySettings.model_fields["lease_s"].default


@dataclass(frozen=True)
class Guarded:
    """A server that knows its callers."""

    server: Server
    keys: Path
    metrics_port: int
    secrets: dict[str, str] = field(default_factory=dict)

    def key(self, key_id: str, models: tuple[str, ...] = ("*",), admin: bool = False, **limits: int) -> str:
        """A new one."""
        allowance = Allowance.model_validate(limits)
        self.secrets[key_id] = key_admin.create(
            self.keys, lambda secrets: Key(id=key_id, secrets=secrets, models=models, admin=admin, limits=allowance)
        )
        return self.secrets[key_id]

    def client(self, secret: str) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        headers = {"authorization": f"Bearer {secret}"}
        return httpx.AsyncClient(base_url=self.server.url, headers=headers, timeout=600, limits=limits)

    async def admin(self, path: str) -> dict[str, Any]:
        """An answer of the admin API."""
        async with self.client(StateDir(self.server.state).admin_token()) as client:
            response = await client.get(f"/admin/v1/{path}")
            assert response.status_code == 200, response.text
            answer: dict[str, Any] = response.json()
            return answer

    async def running(self) -> list[int]:
        """Requests in each engine."""
        return [replica["running_requests"] for replica in (await self.admin("replicas"))["replicas"]]

    async def generated_tokens(self) -> float:
        """By all engines, as they themselves count."""
        async with httpx.AsyncClient() as client:
            text = (await client.get(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=60)).text
        samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
        return sum(sample.value for sample in samples if sample.name == "vllm:generation_tokens_total")

    def processes(self) -> list[psutil.Process]:
        """Of the replicas."""
        return self.server.actors("EngineReplica")


@pytest.fixture(scope="package")
def guarded(story: Story, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    """The base with `french` and `german`. The last test of the package stops it."""
    home = tmp_path_factory.mktemp("guarded")
    keys = home / "keys.json"
    keys.write_text(KeyFile().model_dump_json())
    served = [story.artifacts["french"], story.artifacts["german"]]
    metrics_port = free_port()
    words = ("--replicas", str(REPLICAS), "--keys-file", str(keys), "--metrics-port", str(metrics_port))
    # On a machine of any speed a request waits for its turn, and is not refused because others took long.
    words = (*words, "--max-wait", "3000")
    options = (*words, f"--vllm-arg=--max-num-seqs={MAX_RUNNING + 1}", *SLOT_OPTIONS, *ENGINE_OPTIONS)
    with running_server(served, home / "state", *options, log=home / "server.log") as url:
        yield Guarded(Server(url, home / "state"), keys, metrics_port)


def completion(model: str = "tiny-llama", tokens: int = 4, **fields: Any) -> dict[str, Any]:
    return {"model": model, "prompt": "the rain", "max_tokens": tokens, "ignore_eos": True, "temperature": 0} | fields


@contextlib.asynccontextmanager
async def stream(client: httpx.AsyncClient, request: dict[str, Any]) -> AsyncIterator[httpx.Response]:
    """From its first byte on."""
    async with client.stream("POST", PATH, json=request | {"stream": True}) as response:
        yield response


async def until(holds: Callable[[], Any], timeout_s: float = 300) -> None:
    """Asks again and again; fails if it never holds. The time only ends a test that hangs."""
    async with asyncio.timeout(timeout_s):
        while not await holds():  # noqa: ASYNC110  (it is asked of other processes)
            await asyncio.sleep(0.1)


def for_long(n: int) -> dict[str, Any]:
    """A request that still runs after a shared machine stood still for some seconds."""
    return completion(tokens=LONG, n=n, temperature=1)


def code(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


async def total(guarded: Guarded, number: int) -> bool:
    """Whether this number of requests runs in all engines together."""
    return sum(await guarded.running()) == number
