"""Everything hostile against every surface, and what was seen."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import httpx
import yaml
from pydantic import ValidationError

from benchmarks.faults.callers import client_of
from benchmarks.faults.world import World
from benchmarks.hostile.files import Surface, damaged, variants
from benchmarks.hostile.requests import Bad, bad_requests
from convert.artifact import MANIFEST, Artifact
from convert.errors import ConvertError
from convert.inspection import inspect
from serve.admission import Admission
from serve.candidate import Candidate
from serve.config import AdmissionSettings, EngineSettings
from serve.deployed import read_settings
from serve.desired import Desired
from serve.errors import ServeError
from serve.keys import KeyFile
from serve.log import CatalogueLog
from serve.objects import Directory
from serve.state import StateDir
from serve.traffic import read_log

HUNG_S = 20.0
_AT_ONCE = 8
_SECRET = b"root:"  # what /etc/passwd begins with

What = Literal["", "crashed", "hung", "escaped", "leaked", "killed"]

# Bytes that are no HTTP, or are two things at once.
_RAW = (
    b"\r\n\r\n", b"GET", b"\x16\x03\x01\x02\x00\x01\x00", b"GET / HTTP/9.9\r\n\r\n", b"A" * 100_000,
    b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /x",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZZ\r\n",
    b"GET /v1/models HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * 5000 + b"\r\n",
    b"GET /v1/models\x00 HTTP/1.1\r\nHost: x\r\n\r\n", b"GET /v1/models HTTP/1.1\nHost: x\n\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"CONNECT 169.254.169.254:80 HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET http://169.254.169.254/ HTTP/1.1\r\nHost: x\r\n\r\n",
)  # fmt: skip


@dataclass(frozen=True)
class Found:
    """One case: `what` went wrong, or nothing."""

    surface: str
    what: What = ""
    told: str = ""


async def attack_api(world: World, every: int) -> list[Found]:
    await world.learn()
    before = {it.pid for part in ("replica", "engine") for it in world.processes(part)}
    admin = StateDir(world.local).admin_token()
    secrets = (world.key.encode(), admin.encode(), _SECRET)
    found = await _ask_all("API", world.url, world.key, bad_requests()[::every], secrets)
    found += await _ask_all("admin API", world.url, admin, _bad_admin_requests(world)[::every], secrets[2:])
    for sent in _RAW[::every]:
        found.append(await _send_raw(world, sent))
    after = {it.pid for part in ("replica", "engine") for it in world.processes(part)}
    if before - after:
        found.append(Found("API", "killed", f"{len(before - after)} processes of engines ended"))
    return found


async def _ask_all(surface: str, url: str, key: str, cases: Sequence[Bad], secrets: tuple[bytes, ...]) -> list[Found]:
    found: list[Found] = []
    waiting = iter(cases)

    async def ask_on() -> None:
        async with client_of(url, key) as client:
            for bad in waiting:
                found.append(await _ask(surface, client, bad, secrets))
                if len(found) % 500 == 0:
                    print(f"{surface}: {len(found)} of {len(cases)}", flush=True)

    await asyncio.gather(*(ask_on() for _ in range(_AT_ONCE)))
    return found


async def _ask(surface: str, client: httpx.AsyncClient, bad: Bad, secrets: tuple[bytes, ...]) -> Found:
    shown = f"{bad.method} {bad.path[:60]} {bad.body[:200]!r} {bad.headers}"
    try:
        answer = await client.request(bad.method, bad.path, content=bad.body, headers=bad.headers, timeout=HUNG_S)
    except httpx.TimeoutException:
        return Found(surface, "hung", shown)
    except (httpx.TransportError, httpx.InvalidURL, ValueError, UnicodeError):
        return Found(surface)  # refused before it was a request: by the proxy, or by the client itself
    if answer.status_code >= 500 and answer.status_code not in (501, 503):
        return Found(surface, "crashed", f"{answer.status_code} {answer.text[:300]} for {shown}")
    if any(secret in answer.content for secret in secrets):
        return Found(surface, "leaked", shown)
    return Found(surface)


def _bad_admin_requests(world: World) -> list[Bad]:
    candidate = asdict(world.candidate("other", "alpine"))
    good: Mapping[str, Any] = {
        "/admin/v1/adapters": {"candidate": candidate},
        "/admin/v1/adapters/french/rollback": {"revision": candidate["revision"]},
        "/admin/v1/adapters/french/canary": {"revision": candidate["revision"], "share": 0.1},
        "/admin/v1/adapters/french/pin": {"revision": candidate["revision"]},
        "/v1/load_lora_adapter": {"lora_name": "x", "lora_path": "/etc/passwd"},
        "/v1/unload_lora_adapter": {"lora_name": "nobody"},
    }
    cases = [
        Bad("POST", path, content, {"content-type": "application/json"})
        for number, (path, body) in enumerate(good.items())
        for content in damaged(json.dumps(body).encode(), 150, seed=number)
    ]
    paths = ("/etc/passwd", "/proc/self/environ", "../../..", str(world.home), "\x00", "//etc", "~", "s3://x/y")
    cases += [
        Bad("POST", path, json.dumps(body).encode(), {"content-type": "application/json"})
        for it in paths
        for path, body in (
            ("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": it}),
            ("/admin/v1/adapters", {"path": it, "name": "x"}),
            ("/admin/v1/adapters", {"path": it, "name": "../../x"}),
        )
    ]
    names = ("..", "%2e%2e%2fetc", "a" * 5000, "%00", "french@x", "%F0%9F%98%80")
    return cases + [Bad(method, f"/admin/v1/adapters/{it}") for it in names for method in ("GET", "DELETE")]


async def _send_raw(world: World, sent: bytes) -> Found:
    """Whatever comes back, or nothing: others must be answered meanwhile."""
    host, _, port = world.url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    with contextlib.suppress(OSError, TimeoutError):
        writer.write(sent)
        async with asyncio.timeout(1):
            await reader.read(1000)
    try:
        async with client_of(world.url, world.key) as client:
            answer = await client.get("/v1/models", timeout=HUNG_S)
    except httpx.TimeoutException:
        return Found("HTTP", "hung", repr(sent[:80]))
    finally:
        writer.close()
    return Found("HTTP") if answer.is_success else Found("HTTP", "crashed", f"{answer.status_code} after {sent[:80]!r}")


def attack_files(artifacts: Mapping[str, Path], work: Path, each: int) -> list[Found]:
    """`artifacts` as a World has them. What is read lies in `work`; beside it nothing may change."""
    work.mkdir(parents=True)
    found = []
    for surface in surfaces(artifacts, work):
        before = set(work.parent.rglob("*"))
        found += [_read(surface, directory) for directory in variants(surface, each, work)]
        if escaped := set(work.parent.rglob("*")) - before:
            found.append(Found(surface.name, "escaped", str(sorted(escaped)[:3])))
        print(f"{surface.name}: {each} damaged files", flush=True)
    return found


def _read(surface: Surface, directory: Path) -> Found:
    began = time.monotonic()
    try:
        surface.read(directory)
        told = ""
    except (ConvertError, ServeError, ValidationError) as error:
        told = str(error)
    except Exception as error:
        return Found(surface.name, "crashed", f"{error!r} for {(directory / surface.file).read_bytes()[:200]!r}")
    if time.monotonic() - began > HUNG_S:
        return Found(surface.name, "hung", told)
    return Found(surface.name, "leaked", told) if _SECRET.decode() in told else Found(surface.name)


def surfaces(artifacts: Mapping[str, Path], work: Path) -> Iterable[Surface]:
    checkpoint, base = (artifacts["first"].parent / name for name in ("checkpoint-first", "base"))
    adapter = artifacts["first"] / "adapter"
    manifest = Artifact.open(artifacts["first"]).manifest
    candidate = Candidate.of(manifest, "french")
    assert candidate is not None
    engine = EngineSettings(
        model_path=artifacts["first"] / "model", model_name="base", fingerprint=candidate.base, max_lora_rank=64
    )
    admission = Admission(engine, AdmissionSettings())
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        yield Surface(f"adapter {file}", adapter, file, lambda it: admission.check(candidate, it))
    for file in sorted(it.name for it in checkpoint.iterdir() if it.is_file()):
        yield Surface(f"checkpoint {file}", checkpoint, file, lambda it: inspect(it, base))
    for file in ("config.json", "tokenizer_config.json", "model.safetensors"):
        if (base / file).exists():
            yield Surface(f"base {file}", base, file, lambda it: inspect(checkpoint, it))
    yield Surface("manifest", artifacts["second"], MANIFEST, lambda it: Artifact.open(it).verify())
    yield from _configured(artifacts, work)


def _configured(artifacts: Mapping[str, Path], work: Path) -> Iterable[Surface]:
    """Files that operators write, or that Graft writes for itself."""
    keys = {"keys": [{"id": "one", "secrets": [{"sha256": "ab" * 32}], "models": ["*"], "limits": {}}]}
    settings = {
        "engine": {"artifact": str(artifacts["first"]), "max_lora_rank": 16},
        "gateway": {"admin_tokens": {"admin": "a" * 64}},
        "state_dir": str(work / "state"),
        "replicas": 2,
    }
    desired = {"adapters": [{"name": "french", "artifact": str(artifacts["second"]), "pin": True}]}
    line = {"time": "2026-01-01T00:00:00+00:00", "model": "french", "tokens": 20}
    lines = "\n".join(json.dumps(line) for _ in itertools.repeat(None, 20))
    for name, file, content, read in (
        ("keys file", "keys.json", json.dumps(keys), lambda it: KeyFile.read(it / "keys.json")),
        ("settings", "settings.yaml", json.dumps(settings), lambda it: read_settings(it / "settings.yaml")),
        ("desired state", "adapters.yaml", yaml.safe_dump(desired), lambda it: Desired.read(it / "adapters.yaml")),
        ("traffic log", "log.jsonl", lines, lambda it: read_log(it / "log.jsonl", 0.01, 1, 60)),
    ):
        directory = work / f"good {name}"
        directory.mkdir()
        (directory / file).write_text(content)
        yield Surface(name, directory, file, read)
    yield _catalogue(artifacts, work)


def _catalogue(artifacts: Mapping[str, Path], work: Path) -> Surface:
    directory = work / "good catalogue"
    log = CatalogueLog(Directory(directory))
    candidate = Candidate.of(Artifact.open(artifacts["second"]).manifest, "french")
    assert candidate is not None
    log.stage(candidate)
    log.promote(candidate)
    file = max(it for it in directory.rglob("*.json"))
    return Surface(
        "catalogue", directory, str(file.relative_to(directory)), lambda it: CatalogueLog(Directory(it)).read()
    )
