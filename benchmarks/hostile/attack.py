"""Sends the invalid requests and reads the damaged files; each case has a result."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
from pydantic import ValidationError

from benchmarks.faults.callers import client_of
from benchmarks.faults.testbed import Testbed
from benchmarks.hostile.access import attack_without_token
from benchmarks.hostile.cases import CaseResult
from benchmarks.hostile.files import Surface, damaged, variants
from benchmarks.hostile.requests import BadRequest, bad_requests
from benchmarks.hostile.surfaces import surfaces
from benchmarks.progress import step
from convert.errors import ConvertError
from serve.catalogue.state_dir import StateDir
from serve.errors import ServeError

HUNG_AFTER_S = 20.0
_AT_ONCE = 8
_SECRET = b"root:"  # what /etc/passwd begins with

# Bytes that are not valid HTTP, or that two parsers could read differently.
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


async def attack_api(testbed: Testbed, every: int) -> list[CaseResult]:
    step("the server is ready; recording the expected answers")
    await testbed.learn_expected_answers()
    before = _server_pids(testbed)
    admin = StateDir(testbed.local).admin_token()
    secrets = (testbed.key.encode(), admin.encode(), _SECRET)
    results = await _send_all("API", testbed.url, testbed.key, bad_requests()[::every], secrets)
    results += await _send_all("admin API", testbed.url, admin, _bad_admin_requests(testbed)[::every], secrets[2:])
    results += await attack_without_token(testbed.url)
    for sent in _RAW[::every]:
        results.append(await _send_raw(testbed, sent))
    after = _server_pids(testbed)
    if before - after:
        results.append(CaseResult("API", "killed", f"{len(before - after)} processes of engines ended"))
    return results


def _server_pids(testbed: Testbed) -> set[int]:
    return {process.pid for part in ("replica", "engine") for process in testbed.processes(part)}


async def _send_all(
    surface: str, url: str, key: str, cases: Sequence[BadRequest], secrets: tuple[bytes, ...]
) -> list[CaseResult]:
    results: list[CaseResult] = []
    waiting = iter(cases)

    async def send_remaining() -> None:
        async with client_of(url, key) as client:
            for bad in waiting:
                results.append(await _send_case(surface, client, bad, secrets))
                if len(results) % 500 == 0:
                    step(f"{surface}: {len(results)} of {len(cases)} requests")

    await asyncio.gather(*(send_remaining() for _ in range(_AT_ONCE)))
    return results


async def _send_case(
    surface: str, client: httpx.AsyncClient, bad: BadRequest, secrets: tuple[bytes, ...]
) -> CaseResult:
    shown = f"{bad.method} {bad.path[:60]} {bad.body[:200]!r} {bad.headers}"
    try:
        answer = await client.request(bad.method, bad.path, content=bad.body, headers=bad.headers, timeout=HUNG_AFTER_S)
    except httpx.TimeoutException:
        return CaseResult(surface, "hung", shown)
    except (httpx.TransportError, httpx.InvalidURL, ValueError, UnicodeError):
        return CaseResult(surface)  # the client or the proxy refused it
    if answer.status_code >= 500 and answer.status_code not in (501, 503):
        return CaseResult(surface, "crashed", f"{answer.status_code} {answer.text[:300]} for {shown}")
    if answer.is_success and b'data: {"error"' in answer.content[:20]:
        return CaseResult(surface, "crashed", f"a stream that begins with an error: {answer.text[:300]} for {shown}")
    if answer.is_client_error and not isinstance(_error_of(answer).get("message"), str):
        return CaseResult(surface, "crashed", f"an error in no form of the API: {answer.text[:300]} for {shown}")
    if any(secret in answer.content for secret in secrets):
        return CaseResult(surface, "leaked", shown)
    return CaseResult(surface)


def _error_of(answer: httpx.Response) -> Mapping[str, Any]:
    """The `error` of an answer; of one that HAProxy made, or without a body, a message of our own."""
    if answer.request.method == "HEAD" or not answer.headers.get("content-type", "").startswith("application/json"):
        return {"message": "no JSON"}
    content = answer.json()
    error = content.get("error") if isinstance(content, dict) else None
    return error if isinstance(error, dict) else {}


def _bad_admin_requests(testbed: Testbed) -> list[BadRequest]:
    candidate = asdict(testbed.candidate("other", "alpine"))
    good: Mapping[str, Any] = {
        "/admin/v1/adapters": {"candidate": candidate},
        "/admin/v1/adapters/french/rollback": {"revision": candidate["revision"]},
        "/admin/v1/adapters/french/canary": {"revision": candidate["revision"], "share": 0.1},
        "/admin/v1/adapters/french/pin": {"revision": candidate["revision"]},
        "/v1/load_lora_adapter": {"lora_name": "x", "lora_path": "/etc/passwd"},
        "/v1/unload_lora_adapter": {"lora_name": "nobody"},
    }
    cases = [
        BadRequest("POST", path, content, {"content-type": "application/json"})
        for number, (path, body) in enumerate(good.items())
        for content in damaged(json.dumps(body).encode(), 150, seed=number)
    ]
    paths = ("/etc/passwd", "/proc/self/environ", "../../..", str(testbed.home), "\x00", "//etc", "~", "s3://x/y")
    cases += [
        BadRequest("POST", path, json.dumps(body).encode(), {"content-type": "application/json"})
        for file in paths
        for path, body in (
            ("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": file}),
            ("/admin/v1/adapters", {"path": file, "name": "x"}),
            ("/admin/v1/adapters", {"path": file, "name": "../../x"}),
        )
    ]
    names = ("..", "%2e%2e%2fetc", "a" * 5000, "%00", "french@x", "%F0%9F%98%80")
    return cases + [BadRequest(method, f"/admin/v1/adapters/{name}") for name in names for method in ("GET", "DELETE")]


async def _send_raw(testbed: Testbed, sent: bytes) -> CaseResult:
    """Send raw bytes, which may get any response or none. Another caller must be answered meanwhile."""
    host, _, port = testbed.url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    with contextlib.suppress(OSError, TimeoutError):
        writer.write(sent)
        async with asyncio.timeout(1):
            await reader.read(1000)
    try:
        async with client_of(testbed.url, testbed.key) as client:
            answer = await client.get("/v1/models", timeout=HUNG_AFTER_S)
    except httpx.TimeoutException:
        return CaseResult("HTTP", "hung", repr(sent[:80]))
    finally:
        writer.close()
    return (
        CaseResult("HTTP")
        if answer.is_success
        else CaseResult("HTTP", "crashed", f"{answer.status_code} after {sent[:80]!r}")
    )


def attack_files(artifacts: Mapping[str, Path], work: Path, each: int) -> list[CaseResult]:
    """Read damaged copies of files of a testbed's `artifacts`, `each` of every format. The copies lie in `work`, and
    nothing may be written beside it."""
    work.mkdir(parents=True)
    results = []
    for surface in surfaces(artifacts, work):
        before = set(work.parent.rglob("*"))
        results += [_read(surface, directory) for directory in variants(surface, each, work)]
        if escaped := set(work.parent.rglob("*")) - before:
            results.append(CaseResult(surface.name, "escaped", str(sorted(escaped)[:3])))
        step(f"{surface.name}: {each} damaged files")
    return results


def _read(surface: Surface, directory: Path) -> CaseResult:
    began = time.monotonic()
    content = (directory / surface.file).read_bytes()
    try:
        surface.read(directory)
        detail = ""
        if surface.must_refuse(content):
            return CaseResult(surface.name, "accepted", repr(content[:200]))
    except (ConvertError, ServeError, ValidationError) as error:
        detail = str(error)
    except Exception as error:
        return CaseResult(surface.name, "crashed", f"{error!r} for {content[:200]!r}")
    if time.monotonic() - began > HUNG_AFTER_S:
        return CaseResult(surface.name, "hung", detail)
    return CaseResult(surface.name, "leaked", detail) if _SECRET.decode() in detail else CaseResult(surface.name)
