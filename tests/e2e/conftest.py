"""Real vLLM engines behind real Ray Serve, on a tiny model that the tests make and Graft converts."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from filelock import FileLock

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from examples.server import running_server
from serve.catalogue.state_dir import StateDir
from tests.convert import parts
from tests.engine_scheduling import SHARED_SERVER, SHARED_SERVER_WITH_KEYS
from tests.recording_proxy import RecordingProxy, recording_proxy

REPLICAS = 2
ENGINE_OPTIONS = (
    *("--vllm-arg=--max-model-len=2048", f"--vllm-arg=--kv-cache-memory-bytes={64 << 20}"),
    *("--vllm-arg=--enable-auto-tool-choice", "--vllm-arg=--tool-call-parser=hermes"),
)
# To Ray's memory monitor every machine is then short of memory: it would kill engines within a second.
MACHINE_WITHOUT_MEMORY = {"RAY_memory_usage_threshold": "0.01"}
# What a dead coordinator has staged is given up after three times as long; the default is a minute.
SYNC_TIMEOUT_S = 25
# Few slots, so that a handful of adapters is more than fits.
SLOTS, RESIDENT = 2, 4
SLOT_OPTIONS = ("--max-active-adapters", str(SLOTS), "--max-resident-adapters", str(RESIDENT))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    shared = {"server": SHARED_SERVER, "guarded": SHARED_SERVER_WITH_KEYS}
    for item in (item for item in items if "tests/e2e/" in item.nodeid):
        item.add_marker("engine")
        for fixture in shared.keys() & getattr(item, "fixturenames", ()):
            if not item.nodeid.startswith(shared[fixture]):
                raise pytest.UsageError(f"{item.nodeid} asks for `{fixture}`: move it to one of {shared[fixture]}")


@dataclass(frozen=True)
class Story:
    """One base, and three QLoRA fine-tunes of it: `french`, its next revision, and `german`."""

    base: Path
    checkpoints: dict[str, Path]
    artifacts: dict[str, Path]


@dataclass(frozen=True)
class Server:
    url: str
    state: Path
    callers: Path | None = None  # where callers of the admin API may name adapters
    proxy: RecordingProxy | None = None  # that of its environment

    def command(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """`python -m serve …` on this server's state directory."""
        return run("serve", *arguments, "--state", self.state)

    def processes(self) -> list[psutil.Process]:
        """That of the server, and all that it started."""
        process = psutil.Process(StateDir(self.state).running_server().pid)
        return [process, *process.children(recursive=True)]

    def actors(self, name: str) -> list[psutil.Process]:
        """Ray names an actor's process after its class."""
        return [process for process in self.processes()[1:] if name in " ".join(arguments_of(process))]


def arguments_of(process: psutil.Process) -> list[str]:
    """Its command line; nothing of one that has ended meanwhile, as Ray's short-lived helpers do at any time."""
    try:
        return list(process.cmdline())
    except psutil.NoSuchProcess:
        return []


@pytest.fixture(scope="session")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    """Made once, also where several processes share the tests: the first one that asks makes it."""
    parallel = "PYTEST_XDIST_WORKER" in os.environ
    home = tmp_path_factory.getbasetemp().parent / "story" if parallel else tmp_path_factory.mktemp("story")
    names = ("french", "french-2", "german")
    story = Story(
        home / "tiny-llama",
        {name: home / name for name in names},
        {name: home / "artifacts" / name for name in names},
    )
    with FileLock(home.with_name("story.lock")):
        if not (home / "complete").exists():
            make_story(story)
            (home / "complete").touch()
    return story


def make_story(story: Story) -> None:
    base, checkpoints, artifacts = story.base, story.checkpoints, story.artifacts
    parts.save_base(base, tied=True, hidden=128)
    for seed, checkpoint in enumerate(checkpoints.values()):
        fine_tune(base, checkpoint, seed)
    convert(checkpoints["french"], base, artifacts["french"])
    convert(checkpoints["french-2"], artifacts["french"], artifacts["french-2"], "--name", "french")
    convert(checkpoints["german"], artifacts["french"], artifacts["german"])


@pytest.fixture(scope="session")
def server(story: Story, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The 4-bit base with `french` and `german` on two engines."""
    home = tmp_path_factory.mktemp("server")
    served = [story.artifacts["french"], story.artifacts["german"]]
    callers = home / "callers"
    callers.mkdir()
    options = (
        *("--replicas", str(REPLICAS), "--adapter-root", str(callers), "--sync-timeout", str(SYNC_TIMEOUT_S)),
        *(*SLOT_OPTIONS, *ENGINE_OPTIONS),
    )
    with recording_proxy() as proxy, contextlib.ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in (proxy.variables | MACHINE_WITHOUT_MEMORY).items():
                patch.setenv(name, value)
            started = running_server(served, home / "state", *options, log=home / "server.log")
            url = stack.enter_context(started)
        yield Server(url, home / "state", callers, proxy)


def fine_tune(base: Path, directory: Path, seed: int) -> Path:
    """A QLoRA checkpoint that is unmistakably its own: random factors, strong enough to change every answer."""
    checkpoint = parts.mark_qlora(parts.save_adapter(base, directory))
    generator = torch.Generator().manual_seed(seed)

    def own(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            name: torch.randn(tensor.shape, generator=generator) * (0.3 if "lora_B" in name else 0.1)
            for name, tensor in tensors.items()
        }

    parts.edit_weights(checkpoint, own)
    return checkpoint


def convert(checkpoint: Path, base: Path, out: Path, *options: str) -> None:
    result = run("convert", "run", checkpoint, "--base", base, "--out", out, *options)
    assert result.returncode == 0, result.stderr


def run(module: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)


def reference_logprobs(model: Any, tokens: list[int]) -> torch.Tensor:
    """Log-probabilities of the token after `tokens`, (vocabulary,), by the model that transformers runs."""
    return parts.logits(model, torch.tensor([tokens]))[-1].log_softmax(-1)
