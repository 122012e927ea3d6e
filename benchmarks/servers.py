"""What is compared: Graft, and vLLM's own API servers, on the same model with the same room for adapters."""

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

from convert.artifact import Artifact
from examples.server import running_server, start, stop
from serve.candidate import Candidate
from serve.intake import take_artifact
from serve.names import AdapterRevision
from serve.ports import free_port
from serve.state import StateDir

START_TIMEOUT_S = 300
_LOAD = "/v1/load_lora_adapter"
# Of each engine, whoever starts it: Graft alone would give one replica all cores.
ENGINE_THREADS = {"OMP_NUM_THREADS": "1"}
COMMON_ARGS = ("--max-model-len", "1024", "--kv-cache-memory-bytes", str(128 << 20))


SIDES = ("bare", "graft")


@dataclass(frozen=True)
class Room:
    """For adapters; without slots an engine runs without any."""

    slots: int
    resident: int


NO_ADAPTERS = Room(0, 0)


@dataclass(frozen=True)
class Graft:
    """A running server, operated through its admin API."""

    url: str
    state: StateDir

    async def publish(self, client: httpx.AsyncClient, candidate: Candidate) -> dict[str, float]:
        return await self._change(client, "", {"candidate": asdict(candidate)})

    async def change(self, client: httpx.AsyncClient, verb: str, adapter: AdapterRevision) -> float:
        """Seconds that `rollback` to a revision takes, or to `pin` or `unpin` it."""
        began = time.monotonic()
        await self._change(client, f"/{adapter.name}/{verb}", {"revision": adapter.revision})
        return time.monotonic() - began

    async def _change(self, client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> dict[str, float]:
        headers = {"authorization": f"Bearer {self.state.admin_token()}"}
        response = await client.post(f"{self.url}/admin/v1/adapters{path}", json=body, headers=headers, timeout=120)
        response.raise_for_status()
        answer: dict[str, float] = response.json()
        return answer

    def store(self, artifact: Path) -> None:
        take_artifact(Artifact.open(artifact), None, self.state.store)


@contextlib.contextmanager
def graft(artifacts: Sequence[Path], home: Path, replicas: int, room: Room) -> Iterator[Graft]:
    home.mkdir(parents=True, exist_ok=True)
    print(f"starting Graft with {replicas} engines …", flush=True)
    adapters = (
        *("--max-lora-rank", "16"),  # as on the other side
        *("--keep-previous", "0"),  # so that every swap loads what it swaps in, as it does on the other side
        *("--max-active-adapters", str(room.slots), "--max-resident-adapters", str(room.resident)),
    )
    options = (
        *("--replicas", str(replicas), "--base-name", "base"),
        *(adapters if room.slots else ("--max-lora-rank", "0")),
        *(f"--vllm-arg={name}={value}" for name, value in zip(COMMON_ARGS[::2], COMMON_ARGS[1::2], strict=True)),
    )
    with running_server(artifacts, home / "state", *options, log=home / "graft.log") as url:
        yield Graft(url, StateDir(home / "state"))


@contextlib.contextmanager
def bare(
    model: Path, home: Path, count: int, room: Room, loaded: Mapping[str, Path] | None = None
) -> Iterator[list[str]]:
    """`count` of vLLM's API servers that let adapters be loaded, and have loaded some by name; their URLs."""
    home.mkdir(parents=True, exist_ok=True)
    adapters = (
        *("--enable-lora", "--max-lora-rank", "16", "--max-loras", str(room.slots)),
        *("--max-cpu-loras", str(room.resident + 1)),
    )
    print(f"starting {count} bare vLLM servers …", flush=True)
    ports = [free_port() for _ in range(count)]
    with contextlib.ExitStack() as stack:
        for number, port in enumerate(ports):
            log = stack.enter_context((home / f"bare-{number}.log").open("w"))
            command = [
                *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)),
                *("--served-model-name", "base", "--host", "127.0.0.1", "--port", str(port), "--enforce-eager"),
                *(adapters if room.slots else ()),
                *COMMON_ARGS,
                "--disable-uvicorn-access-log",
            ]
            stack.callback(stop, start(command, log, _environment()))
        urls = [f"http://127.0.0.1:{port}" for port in ports]
        for url in urls:
            _wait_for(url)
            for name, path in (loaded or {}).items():
                httpx.post(f"{url}{_LOAD}", json=_named(name, path), timeout=60).raise_for_status()
        yield urls


def _named(name: str, path: Path) -> dict[str, str | bool]:
    return {"lora_name": name, "lora_path": str(path.absolute())}


async def load_bare(client: httpx.AsyncClient, url: str, name: str, path: Path, inplace: bool = False) -> float:
    """Seconds that vLLM's own load call takes."""
    began = time.monotonic()
    body = _named(name, path) | {"load_inplace": inplace}
    response = await client.post(f"{url}{_LOAD}", json=body, timeout=60)
    response.raise_for_status()
    return time.monotonic() - began


def _environment() -> dict[str, str]:
    return os.environ | {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        **ENGINE_THREADS,
        "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }


def _wait_for(url: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/health").is_success:
                return
        time.sleep(0.2)
    raise RuntimeError(f"vLLM at {url} did not come up")
