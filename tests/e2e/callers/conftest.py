"""Two real replicas that ask callers for keys."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from examples.server import running_server
from serve import key_writing
from serve.keys import Allowance, Key, KeyFile
from tests.e2e.conftest import ENGINE_OPTIONS, REPLICAS, SLOT_OPTIONS, Server, Story

LONG = 1500
MAX_RUNNING = 4  # in the engine of each replica


@dataclass(frozen=True)
class Guarded:
    """A server that knows its callers."""

    server: Server
    keys: Path
    log: Path

    def new_key(self, key_id: str, models: tuple[str, ...] = ("*",), admin: bool = False, **limits: int) -> str:
        if self.keys.exists():
            with contextlib.suppress(Exception):
                key_writing.revoke(self.keys, key_id)
        allowance = Allowance(**limits)
        return key_writing.create(
            self.keys, lambda secrets: Key(id=key_id, secrets=secrets, models=models, admin=admin, limits=allowance)
        )

    @contextlib.asynccontextmanager
    async def client(self, secret: str, **headers: str) -> AsyncIterator[httpx.AsyncClient]:
        limits = httpx.Limits(max_connections=None)
        headers = {"authorization": f"Bearer {secret}", **headers}
        async with httpx.AsyncClient(base_url=self.server.url, headers=headers, timeout=300, limits=limits) as client:
            yield client

    async def reports(self, admin: str) -> list[dict[str, Any]]:
        async with self.client(admin) as client:
            found: list[dict[str, Any]] = (await client.get("/admin/v1/replicas")).json()["replicas"]
            return found

    def replicas(self) -> list[psutil.Process]:
        """Processes of this server's replicas."""
        pid = json.loads((self.server.state / "server.json").read_bytes())["pid"]
        session = str(psutil.Process(pid).pid)
        del session
        return [it for it in psutil.Process(pid).children(recursive=True) if "ServeReplica" in " ".join(it.cmdline())]


@pytest.fixture(scope="module")
def guarded(story: Story, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    """The base with `french` and `german`."""
    home = tmp_path_factory.mktemp("guarded")
    keys = home / "keys.json"
    keys.write_text(KeyFile().model_dump_json())
    served = [story.artifacts["french"], story.artifacts["german"]]
    options = ("--replicas", str(REPLICAS), "--keys-file", str(keys), f"--vllm-arg=--max-num-seqs={MAX_RUNNING}")
    log = home / "server.log"
    with running_server(served, home / "state", *options, *SLOT_OPTIONS, *ENGINE_OPTIONS, log=log) as url:
        yield Guarded(Server(url, home / "state"), keys, log)


def completion(model: str = "tiny-llama", tokens: int = 4, **fields: Any) -> dict[str, Any]:
    return {"model": model, "prompt": "the rain", "max_tokens": tokens, "ignore_eos": True, "temperature": 0} | fields
