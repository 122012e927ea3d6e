"""The faults. Each disturbs a testbed and returns when it has stopped disturbing; the recovery is timed from then."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from benchmarks.faults import pools
from benchmarks.faults.link import Link, Mode
from benchmarks.faults.testbed import Testbed

PAUSE_S = 5.0
CUT_S = 10.0
STORE_MODES: tuple[Mode, ...] = ("slow", "failing", "silent", "gone")
REDIS_MODES: tuple[Mode, ...] = ("slow", "silent", "gone")
_PHASE_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Fault:
    name: str
    inject: Callable[[Testbed], Awaitable[float | None]]  # returns when the fault ended, by time.monotonic(); None: now
    holds_s: float = 0.0  # for so long it may hold up a request that it does not end
    has_pool: bool = False  # a second pool is added first, which callers ask from then on


def killed(part: str) -> Fault:
    async def inject(testbed: Testbed) -> float | None:
        testbed.processes(part)[0].kill()
        return None

    return Fault(f"{part} killed", inject)


async def all_replicas_killed(testbed: Testbed) -> None:
    """Kills every engine and every replica at once: nobody is left who could answer."""
    for process in (*testbed.processes("engine"), *testbed.processes("replica")):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def paused(part: str) -> Fault:
    async def inject(testbed: Testbed) -> float | None:
        process = testbed.processes(part)[0]
        process.suspend()
        await asyncio.sleep(PAUSE_S)
        process.resume()
        return None

    return Fault(f"{part} stopped for {PAUSE_S:g} s", inject, holds_s=PAUSE_S)


def link_fault(name: str, link: Callable[[Testbed], Link], mode: Mode, seconds: float) -> Fault:
    async def inject(testbed: Testbed) -> float | None:
        with link(testbed).in_mode(mode):
            await asyncio.sleep(seconds)
        return None

    return Fault(f"{name} {mode} for {seconds:g} s", inject, holds_s=seconds)


def writer_killed(phase: str) -> Fault:
    """Kills the replica that writes a publish into the catalogue, as soon as the catalogue shows that phase."""

    async def inject(testbed: Testbed) -> float | None:
        replica = (await testbed.replicas())[0]["address"]
        current = testbed.current("swiss")
        publishing = asyncio.create_task(testbed.publish(_other(testbed, current), "swiss", url=f"http://{replica}"))
        deadline = time.monotonic() + _PHASE_TIMEOUT_S
        while not publishing.done() and time.monotonic() < deadline and not await _shows_phase(testbed, phase, current):
            pass
        listening(testbed, int(replica.rpartition(":")[2])).kill()
        with contextlib.suppress(httpx.HTTPError):
            await publishing
        return None

    return Fault(f"writer of the catalogue killed while {phase}", inject)


def _other(testbed: Testbed, current: str) -> str:
    """The artifact whose revision is not the current one of `swiss`."""
    return "second" if testbed.candidate("first", "swiss").adapter.engine_name == current else "first"


async def _shows_phase(testbed: Testbed, phase: str, before: str) -> bool:
    state = (await asyncio.to_thread(testbed.state.log.read)).adapters["swiss"]
    if phase == "staging":
        return any(revision.staged for revision in state.revisions.values())
    return state.current is not None and state.current.candidate.adapter.engine_name != before


def listening(testbed: Testbed, port: int) -> psutil.Process:
    return next(
        process
        for process in testbed.processes("replica")
        if any(
            connection.laddr.port == port
            for connection in process.net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN
        )
    )


async def everything_killed(testbed: Testbed) -> float:
    """Kills every process of the server, as a power failure does, and starts the server again as a supervisor would."""
    assert testbed.server
    for process in [*testbed.children(), psutil.Process(testbed.server.pid)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    killed = time.monotonic()
    testbed.server.wait()
    await asyncio.to_thread(testbed.start)
    return killed


async def node_killed(testbed: Testbed) -> float:
    """Kills the raylet. The server must exit by itself, so that its supervisor, here this function, starts it again."""
    assert testbed.server
    testbed.processes("node")[0].kill()
    killed = time.monotonic()
    await asyncio.to_thread(testbed.server.wait, 120)
    await asyncio.to_thread(testbed.start)
    return killed


async def disk_full(testbed: Testbed) -> None:
    """Fills the file system that holds the local copies of adapters, and publishes an adapter without a local copy."""
    copy = testbed.local / "adapters" / testbed.candidate("second", "dialect").adapter.revision
    shutil.rmtree(copy)
    filler = testbed.local / "filler"
    with filler.open("wb", buffering=0) as stream, contextlib.suppress(OSError):
        while True:
            stream.write(bytes(1 << 16))
    try:
        with contextlib.suppress(httpx.HTTPError):
            await testbed.add("second", "dialect")
    finally:
        filler.unlink()


async def copy_corrupted(testbed: Testbed) -> None:
    """Flips a bit of the local copy of an adapter and publishes that adapter under another name."""
    revision = testbed.candidate("other", "alpine").adapter.revision
    flip_bit(testbed.local / "adapters" / revision / "adapter_model.safetensors")
    with contextlib.suppress(httpx.HTTPError):
        await testbed.add("other", "alpine")


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-100] ^= 0x40
    path.chmod(0o600)
    path.write_bytes(data)


def clock_skewed(hours: int) -> Fault:
    """A process with a wrong clock stages and promotes a revision in the shared catalogue, as another machine would."""

    async def inject(testbed: Testbed) -> float | None:
        artifact = _other(testbed, testbed.current("swiss"))
        command = [
            *("faketime", "-f", f"{hours:+d}h", sys.executable, "-m", "benchmarks.faults.writer"),
            *(testbed.bucket, str(testbed.local), str(testbed.artifacts[artifact])),
        ]
        await asyncio.to_thread(subprocess.run, command, check=True, timeout=_PHASE_TIMEOUT_S)
        return None

    return Fault(f"a writer's clock is wrong by {hours:+d} h", inject)


def faults() -> Iterator[Fault]:
    """All faults that this machine can run; those that restart the server come last."""
    for part in ("engine", "replica", "proxy", "controller"):
        yield killed(part)
        yield paused(part)
    yield Fault("all replicas killed", all_replicas_killed)
    for phase in ("staging", "promoting"):
        yield writer_killed(phase)
    for mode in STORE_MODES:
        yield link_fault("object store", lambda testbed: testbed.store, mode, CUT_S)
    for mode in REDIS_MODES:
        yield link_fault("Redis", lambda testbed: testbed.redis, mode, CUT_S)
    yield Fault("an adapter's copy corrupted", copy_corrupted)
    yield Fault("engine of an added pool killed", pools.engine_killed, has_pool=True)
    yield Fault("an added pool's model unreadable", pools.model_unreadable, has_pool=True)
    yield Fault("an added pool removed, then added by two", pools.removed_and_added_by_two, has_pool=True)
    yield Fault("the proxy's map of models is old", pools.map_is_old, has_pool=True)
    if os.geteuid() == 0:
        yield Fault("disk full", disk_full)
    if shutil.which("faketime"):
        yield clock_skewed(-3)
        yield clock_skewed(+3)
    yield Fault("node killed", node_killed)
    yield Fault("everything killed", everything_killed)


def unavailable_faults() -> list[str]:
    """The faults that this machine can't run, with the reason."""
    reasons = []
    if os.geteuid() != 0:
        reasons.append("disk full: a file system of its own needs root")
    if not shutil.which("faketime"):
        reasons.append("a writer's clock is wrong: needs faketime (apt-get install faketime)")
    return reasons
