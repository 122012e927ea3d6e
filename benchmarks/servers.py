"""The sides that are compared: Graft, and vLLM's own API servers (`bare`), with the same model and adapter capacity."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.progress import step
from convert.artifact import Artifact
from examples.server import running_server, start, stop
from serve.adapters.ingest import ingest_artifact
from serve.catalogue.candidate import Candidate
from serve.catalogue.state_dir import StateDir
from serve.deployment.ports import free_port
from serve.follower.http_client import direct_client
from serve.names import AdapterRevision

START_TIMEOUT_S = 300
_LOAD_PATH = "/v1/load_lora_adapter"
# For each engine on both sides: by default Graft gives a single replica all cores.
ENGINE_THREADS = {"OMP_NUM_THREADS": "1"}
COMMON_ARGS = ("--max-model-len", "1024", "--kv-cache-memory-bytes", str(128 << 20))

SIDES = ("bare", "graft")


@dataclass(frozen=True)
class AdapterCapacity:
    """How many adapters an engine can hold: in slots, and in host memory. Without slots it runs without adapters."""

    slots: int
    resident: int


NO_CAPACITY = AdapterCapacity(0, 0)


@dataclass(frozen=True)
class Graft:
    """A running server, operated through its admin API."""

    url: str
    state: StateDir

    async def publish(self, client: httpx.AsyncClient, candidate: Candidate) -> dict[str, float]:
        return await self._change(client, "", {"candidate": asdict(candidate)})

    async def change(self, client: httpx.AsyncClient, verb: str, adapter: AdapterRevision) -> float:
        """Seconds that the verb `rollback`, `pin` or `unpin` takes for a revision."""
        began = time.monotonic()
        await self._change(client, f"/{adapter.name}/{verb}", {"revision": adapter.revision})
        return time.monotonic() - began

    async def _change(self, client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> dict[str, float]:
        headers = {"authorization": f"Bearer {self.state.admin_token()}"}
        response = await client.post(f"{self.url}/admin/v1/adapters{path}", json=body, headers=headers, timeout=120)
        response.raise_for_status()
        answer: dict[str, float] = response.json()
        return answer

    def store_artifact(self, artifact: Path) -> None:
        """Copy the adapter of an artifact into the content-addressed store."""
        ingest_artifact(Artifact.open(artifact), None, self.state.store)


@contextlib.contextmanager
def graft(artifacts: Sequence[Path], home: Path, replicas: int, capacity: AdapterCapacity) -> Iterator[Graft]:
    """A running Graft server with the artifacts; it is stopped at the end of the context."""
    home.mkdir(parents=True, exist_ok=True)
    step(f"starting Graft with {replicas} engines")
    adapters = (
        *("--max-lora-rank", "16"),  # as for vLLM
        *("--keep-previous", "0"),  # every swap loads its adapter, as for vLLM
        *("--max-active-adapters", str(capacity.slots), "--max-resident-adapters", str(capacity.resident)),
    )
    options = (
        *("--replicas", str(replicas), "--base-name", "base"),
        *(adapters if capacity.slots else ("--max-lora-rank", "0")),
        *(f"--vllm-arg={name}={value}" for name, value in zip(COMMON_ARGS[::2], COMMON_ARGS[1::2], strict=True)),
    )
    with running_server(artifacts, home / "state", *options, log=home / "graft.log") as url:
        yield Graft(url, StateDir(home / "state"))


@contextlib.contextmanager
def bare(
    model: Path, home: Path, count: int, capacity: AdapterCapacity, loaded: Mapping[str, Path] | None = None
) -> Iterator[list[str]]:
    """The URLs of `count` vLLM API servers that can load adapters at run time; `loaded` are loaded at the start."""
    home.mkdir(parents=True, exist_ok=True)
    adapters = (
        *("--enable-lora", "--max-lora-rank", "16", "--max-loras", str(capacity.slots)),
        *("--max-cpu-loras", str(capacity.resident + 1)),
    )
    step(f"starting {count} of vLLM's own servers")
    ports = [free_port() for _ in range(count)]
    with contextlib.ExitStack() as stack:
        for number, port in enumerate(ports):
            log = stack.enter_context((home / f"bare-{number}.log").open("w"))
            command = [
                *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)),
                *("--served-model-name", "base", "--host", "127.0.0.1", "--port", str(port), "--enforce-eager"),
                *(adapters if capacity.slots else ()),
                *COMMON_ARGS,
                "--disable-uvicorn-access-log",
            ]
            stack.callback(stop, start(command, log, _vllm_environment()))
        urls = [f"http://127.0.0.1:{port}" for port in ports]
        for url in urls:
            _wait_until_healthy(url)
            with direct_client(timeout=60) as client:
                for name, path in (loaded or {}).items():
                    client.post(f"{url}{_LOAD_PATH}", json=_load_request(name, path)).raise_for_status()
        yield urls


def _load_request(name: str, path: Path) -> dict[str, str | bool]:
    return {"lora_name": name, "lora_path": str(path.absolute())}


async def load_bare(client: httpx.AsyncClient, url: str, name: str, path: Path, inplace: bool = False) -> float:
    """Seconds that vLLM's own endpoint takes to load an adapter."""
    began = time.monotonic()
    body = _load_request(name, path) | {"load_inplace": inplace}
    response = await client.post(f"{url}{_LOAD_PATH}", json=body, timeout=60)
    response.raise_for_status()
    return time.monotonic() - began


def _vllm_environment() -> dict[str, str]:
    return os.environ | {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        **ENGINE_THREADS,
        "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }


def _wait_until_healthy(url: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    with direct_client() as client:
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.HTTPError):
                if client.get(f"{url}/health").is_success:
                    return
            time.sleep(0.2)
    raise RuntimeError(f"vLLM at {url} did not come up")
