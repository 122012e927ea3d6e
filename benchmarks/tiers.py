"""Many registered adapters, more of them at work than there are slots, and cold ones; beside bare vLLM."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path

import httpx
import psutil

from benchmarks.adapters import Tiny
from benchmarks.load import Load, ask, http
from benchmarks.record import Figure
from benchmarks.servers import Graft, Room, bare, graft, load_bare
from convert.artifact import Artifact
from examples.demo import ARTIFACTS, convert_all, make_checkpoints
from serve.candidate import Candidate
from serve.entry import Cause, Entry
from serve.log import CatalogueLog

# Puts an adapter in the place of another, the n-th time; returns the revision that answers then.
Swap = Callable[[int], Awaitable[str]]

PROMPT = "the rain in spain"
SETTLE_S = 3.0


async def throughput(server: Graft, tiny: Tiny, room: Room, seconds: float) -> float:
    """Requests a second with twice as many adapters at work as there are slots."""
    names = _working_set(room)
    async with http() as client:
        for number, name in enumerate(names):
            await server.publish(client, tiny.candidate((tiny.first, tiny.second)[number % 2], name))
        return await _rate(client, server.url, names, seconds)


async def bare_throughput(url: str, tiny: Tiny, room: Room, seconds: float) -> float:
    names = _working_set(room)
    async with http() as client:
        for number, name in enumerate(names):
            await load_bare(client, url, name, (tiny.first, tiny.second)[number % 2] / "adapter")
        return await _rate(client, url, names, seconds)


async def registered(
    server: Graft, beside: Graft, tiny: Tiny, counts: Sequence[int], requests: int
) -> dict[str, Figure]:
    """Latency with so many adapters in the catalogue, over that of a server `beside` it that keeps the fewest: they are
    asked in turn, so that a machine which changes its speed does so for both. Memory of the serving process over its
    own before."""
    few, many = counts[0], counts[-1]
    latency, ratio, memory = {}, {}, {}
    async with http() as client:
        await _registered(client, beside, tiny, few)
        for count in counts:
            await _registered(client, server, tiny, count)
            theirs, ours = await _asked_in_turn(client, (beside.url, server.url), tiny.name, requests)
            latency[count], ratio[count] = ours, ours / theirs
            memory[count] = _replica_bytes()
    grown = max(now / memory[few][pid] for pid, now in memory[many].items())
    return {
        **{f"registered_{count}_latency_ms": Figure(1000 * value, "ms") for count, value in latency.items()},
        "registered_10k_latency_ratio": Figure(ratio[many] / ratio[few], "ratio", "<= 1.05"),
        "registered_10k_memory_ratio": Figure(grown, "ratio", "<= 1.05"),
    }


async def _registered(client: httpx.AsyncClient, server: Graft, tiny: Tiny, count: int) -> None:
    await asyncio.to_thread(register, server.state.log, server.state.root, tiny, count)
    await _listed(client, server.url, count)
    await asyncio.sleep(SETTLE_S)


async def _asked_in_turn(client: httpx.AsyncClient, urls: Sequence[str], name: str, requests: int) -> list[float]:
    """The median seconds of each."""
    samples: dict[str, list[float]] = {url: [] for url in urls}
    for _ in range(requests):
        for url in urls:
            answer = await ask(client, url, name, PROMPT, 1, 0)
            assert answer.error is None, answer.error
            samples[url].append(answer.ended_s - answer.began_s)
    return [statistics.median(it) for it in samples.values()]


def register(log: CatalogueLog, state: Path, tiny: Tiny, count: int) -> None:
    """Fill the catalogue up to `count` adapters; written as its entries are, without syncing each to the disk."""
    catalogue = log.read()
    path = state / "catalogue"
    epoch = catalogue.epoch
    for number in range(len(catalogue.current), count):
        candidate = tiny.candidate(tiny.first, f"registered-{number:06}")
        for verb in ("stage", "promote"):
            epoch += 1
            entry = Entry.now(verb, candidate, Cause())
            draft = path / f".draft-{epoch}"
            draft.write_text(entry.model_dump_json())
            draft.rename(path / f"{epoch:010}.json")


def cold_starts(home: Path, count: int) -> dict[str, Figure]:
    """A cold adapter's first token minus a warm one's, over what bare vLLM's load call takes; on a real model."""
    make_checkpoints()
    convert_all()
    artifacts = (ARTIFACTS / "pirate", ARTIFACTS / "zephyr")
    candidate = Candidate.of(Artifact.open(artifacts[1]).manifest)
    assert candidate is not None
    room = Room(slots=1, resident=2)
    with graft(artifacts, home / "cold", 1, room) as server:
        extra = asyncio.run(_cold_minus_warm(server, candidate, count))
    with bare(artifacts[0] / "model", home, 1, room) as urls:
        loads = asyncio.run(_bare_loads(urls[0], artifacts[1] / "adapter", count))
    return {
        "cold_minus_warm_ms": Figure.of([1000 * it for it in extra], "ms"),
        "bare_load_ms": Figure.of([1000 * it for it in loads], "ms"),
        "cold_vs_bare_load": Figure(statistics.median(extra) / statistics.median(loads), "ratio", "<= 1.1"),
    }


async def _cold_minus_warm(server: Graft, candidate: Candidate, count: int) -> list[float]:
    """Many names for one adapter: each is one of its own to the engine. More than fit, so that each is cold."""
    names = [f"cold-{number:03}" for number in range(count)]
    log = server.state.log
    for name in names:
        named = replace(candidate, name=name)
        log.stage(named)
        log.promote(named)
    extra = []
    async with http() as client:
        await _listed(client, server.url, count)
        await asyncio.sleep(SETTLE_S)
        for name in reversed(names):
            # A prompt shorter than a block, so that no cached prefix makes the second one faster.
            cold, *warm = [await ask(client, server.url, name, "Ahoy", 1, 0) for _ in range(4)]
            assert cold.error is None, cold.error
            extra.append(_first_s(cold) - statistics.median(_first_s(it) for it in warm))
    return extra


async def _bare_loads(url: str, path: Path, count: int) -> list[float]:
    """With a request after each, as on the other side."""
    loads = []
    async with http() as client:
        for number in range(count):
            loads.append(await load_bare(client, url, f"cold-{number:03}", path))
            await ask(client, url, f"cold-{number:03}", "Ahoy", 1, 0)
    return loads


def _first_s(answer: object) -> float:
    return answer.first_s - answer.began_s  # type: ignore[attr-defined,no-any-return]


def _working_set(room: Room) -> list[str]:
    return [f"working-{number}" for number in range(2 * room.slots)]


async def _rate(client: httpx.AsyncClient, url: str, names: Sequence[str], seconds: float) -> float:
    load = Load(client, [url], names, PROMPT, workers=2 * len(names), max_tokens=10)
    async with load.running():
        await load.answered(2 * len(names), 0)
        began = load.now()
        await asyncio.sleep(seconds)
        ended = load.now()
    good = [it for it in load.answers if it.error is None and began < it.ended_s <= ended]
    assert not [it for it in load.answers if it.error], "a request failed"
    return len(good) / (ended - began)


async def _listed(client: httpx.AsyncClient, url: str, count: int) -> None:
    deadline = time.monotonic() + 120
    while len((await client.get(f"{url}/v1/models")).json()["data"]) <= count:
        assert time.monotonic() < deadline, "the replica does not follow the catalogue"
        await asyncio.sleep(0.5)


def _replica_bytes() -> dict[int, int]:
    """Of each process that holds an engine's client, the gateway and the catalogue."""
    own = [it for it in psutil.process_iter(["cmdline"]) if "EngineReplica" in " ".join(it.info["cmdline"] or ())]
    return {it.pid: it.memory_info().rss for it in own}
