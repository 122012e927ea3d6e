"""The faults. Each breaks something of a World and returns when it is no longer broken by us: from then on the clock
of the recovery runs."""

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

from benchmarks.faults.link import Link, Mode
from benchmarks.faults.world import World

PAUSE_S = 5.0
CUT_S = 10.0
STORE_MODES: tuple[Mode, ...] = ("slow", "failing", "silent", "gone")
REDIS_MODES: tuple[Mode, ...] = ("slow", "silent", "gone")
_SEEN_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Fault:
    name: str
    happen: Callable[[World], Awaitable[float | None]]  # when it was over, by time.monotonic(); None: now


def killed(part: str) -> Fault:
    async def happen(world: World) -> float | None:
        world.processes(part)[0].kill()
        return None

    return Fault(f"{part} killed", happen)


def paused(part: str) -> Fault:
    async def happen(world: World) -> float | None:
        victim = world.processes(part)[0]
        victim.suspend()
        await asyncio.sleep(PAUSE_S)
        victim.resume()
        return None

    return Fault(f"{part} stopped for {PAUSE_S:g} s", happen)


def link_being(name: str, link: Callable[[World], Link], mode: Mode, seconds: float) -> Fault:
    async def happen(world: World) -> float | None:
        with link(world).being(mode):
            await asyncio.sleep(seconds)
        return None

    return Fault(f"{name} {mode} for {seconds:g} s", happen)


def writer_killed(phase: str) -> Fault:
    """The replica that writes a publish into the catalogue, as soon as the catalogue shows that phase of it."""

    async def happen(world: World) -> float | None:
        replica = (await world.replicas())[0]["address"]
        now = world.current("swiss")
        publishing = asyncio.create_task(world.publish(_other(world, now), "swiss", url=f"http://{replica}"))
        deadline = time.monotonic() + _SEEN_TIMEOUT_S
        while not publishing.done() and time.monotonic() < deadline and not await _shows(world, phase, now):
            pass
        listening(world, int(replica.rpartition(":")[2])).kill()
        with contextlib.suppress(httpx.HTTPError):
            await publishing
        return None

    return Fault(f"writer of the catalogue killed while {phase}", happen)


def _other(world: World, now: str) -> str:
    """The artifact of `swiss` that is not served now."""
    return "second" if world.candidate("first", "swiss").adapter.engine_name == now else "first"


async def _shows(world: World, phase: str, before: str) -> bool:
    state = (await asyncio.to_thread(world.state.log.read)).adapters["swiss"]
    if phase == "staging":
        return any(it.staged for it in state.revisions.values())
    return state.current is not None and state.current.candidate.adapter.engine_name != before


def listening(world: World, port: int) -> psutil.Process:
    return next(
        it
        for it in world.processes("replica")
        if any(found.laddr.port == port for found in it.net_connections("tcp") if found.status == psutil.CONN_LISTEN)
    )


async def everything_killed(world: World) -> float:
    """As when the machine loses power; whoever runs the server starts it again."""
    assert world.server
    for process in [*world.children(), psutil.Process(world.server.pid)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    killed = time.monotonic()
    world.server.wait()
    await asyncio.to_thread(world.start)
    return killed


async def node_killed(world: World) -> float:
    """Ray's own process of this machine. The server has to end by itself, so that whoever runs it starts it again."""
    assert world.server
    world.processes("node")[0].kill()
    killed = time.monotonic()
    await asyncio.to_thread(world.server.wait, 120)
    await asyncio.to_thread(world.start)
    return killed


async def disk_full(world: World) -> None:
    """Where copies of adapters lie. One that has no copy here is published meanwhile."""
    copy = world.local / "adapters" / world.candidate("second", "dialect").adapter.revision
    shutil.rmtree(copy)
    filler = world.local / "filler"
    with filler.open("wb", buffering=0) as stream, contextlib.suppress(OSError):
        while True:
            stream.write(bytes(1 << 16))
    try:
        with contextlib.suppress(httpx.HTTPError):
            await world.add("second", "dialect")
    finally:
        filler.unlink()


async def copy_corrupted(world: World) -> None:
    """A bit of an adapter's copy on this machine turns over, and it is published under another name."""
    revision = world.candidate("other", "alpine").adapter.revision
    flip(world.local / "adapters" / revision / "adapter_model.safetensors")
    with contextlib.suppress(httpx.HTTPError):
        await world.add("other", "alpine")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-100] ^= 0x40
    path.chmod(0o600)
    path.write_bytes(data)


def clock_skewed(hours: int) -> Fault:
    """Another machine, whose clock is wrong, stages and promotes a revision in the shared catalogue."""

    async def happen(world: World) -> float | None:
        artifact = _other(world, world.current("swiss"))
        command = [
            *("faketime", "-f", f"{hours:+d}h", sys.executable, "-m", "benchmarks.faults.writer"),
            *(world.bucket, str(world.local), str(world.artifacts[artifact])),
        ]
        await asyncio.to_thread(subprocess.run, command, check=True, timeout=_SEEN_TIMEOUT_S)
        return None

    return Fault(f"a writer's clock is wrong by {hours:+d} h", happen)


def faults() -> Iterator[Fault]:
    """All that can be had on this machine, the ones that start everything anew last."""
    for part in ("engine", "replica", "proxy", "controller"):
        yield killed(part)
        yield paused(part)
    for phase in ("staging", "promoting"):
        yield writer_killed(phase)
    for mode in STORE_MODES:
        yield link_being("object store", lambda world: world.store, mode, CUT_S)
    for mode in REDIS_MODES:
        yield link_being("Redis", lambda world: world.redis, mode, CUT_S)
    yield Fault("an adapter's copy corrupted", copy_corrupted)
    if os.geteuid() == 0:
        yield Fault("disk full", disk_full)
    if shutil.which("faketime"):
        yield clock_skewed(-3)
        yield clock_skewed(+3)
    yield Fault("node killed", node_killed)
    yield Fault("everything killed", everything_killed)


def impossible_here() -> list[str]:
    """Faults that need something this machine lacks, with the reason."""
    told = []
    if os.geteuid() != 0:
        told.append("disk full: a file system of its own needs root")
    if not shutil.which("faketime"):
        told.append("a writer's clock is wrong: needs faketime (apt-get install faketime)")
    return told
