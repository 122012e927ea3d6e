"""Many registered adapters, more active adapters than slots, and cold starts; partly also on bare vLLM."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path

import httpx
import psutil

from benchmarks.adapters import TinyAdapters
from benchmarks.load import ClosedLoopLoad, ask, http_client
from benchmarks.progress import step
from benchmarks.record import Figure
from benchmarks.servers import AdapterCapacity, Graft, bare, graft, load_bare
from convert.artifact import Artifact
from examples.demo import ARTIFACTS, convert_all, make_checkpoints
from examples.traffic import Answer
from serve.catalogue.candidate import Candidate
from serve.catalogue.entry import Audit, Entry
from serve.catalogue.log import CatalogueLog

# The n-th swap of an adapter; returns the revision that answers from then on.
Swap = Callable[[int], Awaitable[str]]

PROMPT = "the rain in spain"
SETTLE_S = 3.0


async def throughput(server: Graft, tiny: TinyAdapters, capacity: AdapterCapacity, seconds: float) -> float:
    """Requests per second of Graft with twice as many active adapters as slots."""
    names = _working_set(capacity)
    async with http_client() as client:
        for number, name in enumerate(names):
            await server.publish(client, tiny.candidate((tiny.first, tiny.second)[number % 2], name))
        return await _rate(client, server.url, names, seconds)


async def bare_throughput(url: str, tiny: TinyAdapters, capacity: AdapterCapacity, seconds: float) -> float:
    names = _working_set(capacity)
    async with http_client() as client:
        for number, name in enumerate(names):
            await load_bare(client, url, name, (tiny.first, tiny.second)[number % 2] / "adapter")
        return await _rate(client, url, names, seconds)


async def registered(
    server: Graft, reference: Graft, tiny: TinyAdapters, counts: Sequence[int], requests: int
) -> dict[str, Figure]:
    """Latency and memory with `counts` adapters in the catalogue. Latency is compared with a `reference` server that
    keeps the smallest count; requests alternate between both, so that drift of the machine affects both. Memory is
    that of the replica over its own memory at the smallest count."""
    few, many = counts[0], counts[-1]
    latency, ratio, memory = {}, {}, {}
    async with http_client() as client:
        await _register_and_settle(client, reference, tiny, few)
        for count in counts:
            await _register_and_settle(client, server, tiny, count)
            step(f"{count} adapters registered, measuring the latency of {requests} requests")
            reference_s, server_s = await _median_latencies_s(client, (reference.url, server.url), tiny.name, requests)
            latency[count], ratio[count] = server_s, server_s / reference_s
            memory[count] = _replica_bytes()
    grown = max(now / memory[few][pid] for pid, now in memory[many].items())
    return {
        **{f"registered_{count}_latency_ms": Figure(1000 * value, "ms") for count, value in latency.items()},
        "registered_10k_latency_ratio": Figure(ratio[many] / ratio[few], "ratio", "<= 1.05"),
        "registered_10k_memory_ratio": Figure(grown, "ratio", "<= 1.05"),
    }


async def _register_and_settle(client: httpx.AsyncClient, server: Graft, tiny: TinyAdapters, count: int) -> None:
    await asyncio.to_thread(register, server.state.log, server.state.root, tiny, count)
    await _wait_until_listed(client, server.url, count)
    await asyncio.sleep(SETTLE_S)


async def _median_latencies_s(client: httpx.AsyncClient, urls: Sequence[str], name: str, requests: int) -> list[float]:
    """The median latency of each server."""
    samples: dict[str, list[float]] = {url: [] for url in urls}
    for _ in range(requests):
        for url in urls:
            answer = await ask(client, url, name, PROMPT, 1, 0)
            assert answer.error is None, answer.error
            samples[url].append(answer.ended_s - answer.began_s)
    return [statistics.median(latencies) for latencies in samples.values()]


def register(log: CatalogueLog, state: Path, tiny: TinyAdapters, count: int) -> None:
    """Fill the catalogue up to `count` adapters: entries in its format, without an fsync for each."""
    catalogue = log.read()
    path = state / "catalogue"
    epoch = catalogue.epoch
    for number in range(len(catalogue.current), count):
        candidate = tiny.candidate(tiny.first, f"registered-{number:06}")
        for verb in ("stage", "promote"):
            epoch += 1
            entry = Entry.now(verb, candidate, Audit())
            draft = path / f".draft-{epoch}"
            draft.write_text(entry.model_dump_json())
            draft.rename(path / f"{epoch:010}.json")


def cold_starts(home: Path, count: int) -> dict[str, Figure]:
    """Time to first token of a cold adapter minus that of a warm one, over vLLM's own load call; on a real model."""
    make_checkpoints()
    convert_all()
    step(f"{count} cold starts")
    artifacts = (ARTIFACTS / "pirate", ARTIFACTS / "zephyr")
    candidate = Candidate.of(Artifact.open(artifacts[1]).manifest)
    assert candidate is not None
    capacity = AdapterCapacity(slots=1, resident=2)
    with graft(artifacts, home / "cold", 1, capacity) as server:
        differences_s = asyncio.run(_cold_minus_warm(server, candidate, count))
    with bare(artifacts[0] / "model", home, 1, capacity) as urls:
        loads_s = asyncio.run(_bare_loads(urls[0], artifacts[1] / "adapter", count))
    return {
        "cold_minus_warm_ms": Figure.of([1000 * seconds for seconds in differences_s], "ms"),
        "bare_load_ms": Figure.of([1000 * seconds for seconds in loads_s], "ms"),
        "cold_vs_bare_load": Figure(statistics.median(differences_s) / statistics.median(loads_s), "ratio", "<= 1.1"),
    }


async def _cold_minus_warm(server: Graft, candidate: Candidate, count: int) -> list[float]:
    """Publishes one adapter under more names than fit; each name is an adapter of its own to the engine, and cold."""
    names = [f"cold-{number:03}" for number in range(count)]
    log = server.state.log
    for name in names:
        named = replace(candidate, name=name)
        log.stage(named)
        log.promote(named)
    differences_s = []
    async with http_client() as client:
        await _wait_until_listed(client, server.url, count)
        await asyncio.sleep(SETTLE_S)
        for name in reversed(names):
            # The prompt is shorter than a block, so that the prefix cache can't make the later requests faster.
            cold, *warm = [await ask(client, server.url, name, "Ahoy", 1, 0) for _ in range(4)]
            assert cold.error is None, cold.error
            differences_s.append(_ttft_s(cold) - statistics.median(_ttft_s(answer) for answer in warm))
    return differences_s


async def _bare_loads(url: str, path: Path, count: int) -> list[float]:
    """Seconds of each load call; a request follows each, as for Graft."""
    loads_s = []
    async with http_client() as client:
        for number in range(count):
            loads_s.append(await load_bare(client, url, f"cold-{number:03}", path))
            await ask(client, url, f"cold-{number:03}", "Ahoy", 1, 0)
    return loads_s


def _ttft_s(answer: Answer) -> float:
    assert answer.first_s is not None
    return answer.first_s - answer.began_s


def _working_set(capacity: AdapterCapacity) -> list[str]:
    return [f"working-{number}" for number in range(2 * capacity.slots)]


async def _rate(client: httpx.AsyncClient, url: str, names: Sequence[str], seconds: float) -> float:
    step(f"throughput of {len(names)} adapters for {seconds:g} s")
    load = ClosedLoopLoad(client, [url], names, PROMPT, workers=2 * len(names), max_tokens=10)
    async with load.running():
        await load.answered(2 * len(names), 0)
        began = load.now()
        await asyncio.sleep(seconds)
        ended = load.now()
    answered = [answer for answer in load.answers if answer.error is None and began < answer.ended_s <= ended]
    assert not [answer for answer in load.answers if answer.error], "a request failed"
    return len(answered) / (ended - began)


async def _wait_until_listed(client: httpx.AsyncClient, url: str, count: int) -> None:
    deadline = time.monotonic() + 120
    while len((await client.get(f"{url}/v1/models")).json()["data"]) <= count:
        assert time.monotonic() < deadline, "the replica does not follow the catalogue"
        await asyncio.sleep(0.5)


def _replica_bytes() -> dict[int, int]:
    """Resident bytes of each replica process, by process id."""
    replicas = [
        process
        for process in psutil.process_iter(["cmdline"])
        if "EngineReplica" in " ".join(process.info["cmdline"] or ())
    ]
    return {process.pid: process.memory_info().rss for process in replicas}
