"""Half an hour of everything that happens in production: does anything grow, slow down or get stuck?

`python -m benchmarks.soak` runs the deployment of `benchmarks.faults` (two engines, an object store, a Redis, callers
with keys). Callers ask for every adapter while one of them is republished every few seconds; others leave in the
middle of a stream, read slowly, or send what nobody should. Memory, descriptors, threads and processes are sampled.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.faults.callers import Asked, Callers, client_of, request
from benchmarks.faults.run import Publisher
from benchmarks.faults.world import PARTS, World, world
from benchmarks.hostile.requests import bad_requests
from benchmarks.record import RESULTS, Figure, write_result

SAMPLE_EVERY_S = 5.0
_LEAVERS, _DAWDLERS = 2, 1
_LEAVE_AFTER_S = 0.05
_READ_PAUSE_S = 0.05
_RUDE_PAUSE_S = 0.2


@dataclass(frozen=True)
class Sample:
    """What the server's processes hold at a time, in seconds since the begin."""

    at_s: float
    memory_bytes: int
    descriptors: int
    threads: int
    processes: int
    memory_by_part: dict[str, int]


@dataclass
class Soak:
    world: World
    callers: Callers
    publisher: Publisher
    samples: list[Sample] = field(default_factory=list)
    left: int = 0  # callers that left in the middle
    dawdled: int = 0  # streams that were read slowly, to the end
    bad: Counter[str] = field(default_factory=Counter)  # answers to bad input, as `4xx`

    async def run(self, seconds: float) -> None:
        async with self.callers.asking():
            work = [self.publisher.publish_on(), self._sample_on(), self._bad_input_on()]
            work += [self._leave_on() for _ in range(_LEAVERS)] + [self._dawdle_on() for _ in range(_DAWDLERS)]
            tasks = [asyncio.create_task(it) for it in work]
            await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
            for task in tasks:
                if task.done():
                    task.result()
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _sample_on(self) -> None:
        while True:
            self.samples.append(await asyncio.to_thread(sampled, self.world, self.callers.now()))
            answered = len(self.callers.asked)
            print(f"\r{self.callers.now():6.0f} s   {answered} requests, {len(self.publisher.acknowledged)} swaps, "
                  f"{self.samples[-1].memory_bytes >> 20} MiB", end="", flush=True)  # fmt: skip
            await asyncio.sleep(SAMPLE_EVERY_S)

    async def _leave_on(self) -> None:
        for turn in itertools.count():
            body = request(self.callers.model(turn)) | {"stream": True, "max_tokens": 200}
            with contextlib.suppress(httpx.HTTPError):
                async with self._streaming(body):
                    await asyncio.sleep(_LEAVE_AFTER_S)
                self.left += 1
            await asyncio.sleep(_RUDE_PAUSE_S)

    async def _dawdle_on(self) -> None:
        for turn in itertools.count():
            body = request(self.callers.model(turn)) | {"stream": True, "max_tokens": 40}
            with contextlib.suppress(httpx.HTTPError):
                async with self._streaming(body) as response:
                    async for _ in response.aiter_raw(64):
                        await asyncio.sleep(_READ_PAUSE_S)
                self.dawdled += 1

    @contextlib.asynccontextmanager
    async def _streaming(self, body: dict[str, Any]) -> AsyncIterator[httpx.Response]:
        async with (
            client_of(self.callers.url, self.callers.key) as client,
            client.stream("POST", "/v1/completions", json=body) as response,
        ):
            yield response

    async def _bad_input_on(self) -> None:
        for bad in itertools.cycle(bad_requests()):
            with contextlib.suppress(httpx.TransportError):
                async with client_of(self.callers.url, self.callers.key) as client:
                    answer = await client.request(bad.method, bad.path, content=bad.body, headers=bad.headers)
                    self.bad[f"{answer.status_code // 100}xx"] += 1
            await asyncio.sleep(_RUDE_PAUSE_S)


def sampled(world: World, at_s: float) -> Sample:
    memory, descriptors, threads, processes = Counter[str](), 0, 0, 0
    for process in world.children():
        with contextlib.suppress(psutil.Error), process.oneshot():
            name = f"{process.name()} {' '.join(process.cmdline())}"
            part = next((part for part, words in PARTS.items() if words in name), "other")
            memory[part] += process.memory_info().rss
            descriptors += process.num_fds()
            threads += process.num_threads()
            processes += 1
    return Sample(round(at_s, 1), memory.total(), descriptors, threads, processes, dict(memory))


def growth(values: Sequence[float]) -> float:
    """The median of the last third ÷ that of the third before it; what happens at the begin is warming up."""
    third = len(values) // 3
    return statistics.median(values[-third:]) / statistics.median(values[third : 2 * third])


def figures(soak: Soak, seconds: float) -> dict[str, Figure]:
    samples, asked = soak.samples, soak.callers.asked
    outcomes = Counter(it.outcome for it in asked)
    first = [it.first_s - it.began_s for it in sorted(asked, key=lambda it: it.began_s) if it.first_s is not None]
    return {
        "minutes": Figure(seconds / 60, "min"),
        "requests": Figure(len(asked), "requests"),
        "failed_requests": Figure(len(asked) - outcomes["answered"], "requests", "<= 0"),
        "wrong_answers": Figure(outcomes["wrong"], "answers", "<= 0"),
        "swaps": Figure(len(soak.publisher.acknowledged), "swaps"),
        "swaps_refused": Figure(len(soak.publisher.refused), "swaps", "<= 0"),
        "callers_that_left": Figure(soak.left, "requests"),
        "slow_readers": Figure(soak.dawdled, "requests"),
        "bad_inputs": Figure(soak.bad.total(), "requests"),
        "bad_inputs_with_a_server_error": Figure(soak.bad["5xx"], "requests", "<= 0"),
        "memory_growth_ratio": Figure(growth([it.memory_bytes for it in samples]), "ratio", "<= 1.05"),
        "descriptor_growth_ratio": Figure(growth([it.descriptors for it in samples]), "ratio", "<= 1.05"),
        "thread_growth_ratio": Figure(growth([it.threads for it in samples]), "ratio", "<= 1.05"),
        "process_growth": Figure(samples[-1].processes - samples[len(samples) // 3].processes, "processes", "<= 0"),
        "first_token_growth_ratio": Figure(growth(first), "ratio", "<= 1.1"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30, help="default: 30; less than 30 writes no result")
    minutes = parser.parse_args().minutes
    with tempfile.TemporaryDirectory(prefix="graft-soak-") as directory, world(Path(directory)) as running:
        soak = asyncio.run(soaked(running, 60 * minutes))
    print()
    found = figures(soak, 60 * minutes)
    if minutes < 30:
        for name, figure in found.items():
            print(f"{name:40} {figure.value:.4g} {figure.unit}")
        return
    details = {
        "samples": [asdict(it) for it in soak.samples[::6]],
        "reasons": dict(Counter(it.told for it in soak.callers.asked if it.outcome != "answered").most_common(5)),
        "failed_at_s": [round(it.began_s, 1) for it in soak.callers.asked if it.outcome != "answered"][:20],
    }
    write_result("soak", found, "make soak", details)
    draw(soak.samples, soak.callers.asked, RESULTS / "soak.png")


async def soaked(running: World, seconds: float) -> Soak:
    await running.learn()
    soak = Soak(running, running.callers(workers=4), Publisher(running))
    await soak.run(seconds)
    return soak


def draw(samples: Sequence[Sample], asked: Sequence[Asked], path: Path) -> None:
    """Memory by part, descriptors and threads, and the time to the first token, over the minutes."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (memory, counts, times) = pyplot.subplots(1, 3, figsize=(13, 3.6), constrained_layout=True)
    minutes = [it.at_s / 60 for it in samples]
    for part in sorted({part for it in samples for part in it.memory_by_part}):
        memory.plot(minutes, [it.memory_by_part.get(part, 0) / 2**20 for it in samples], label=part)
    memory.set_title("MiB resident", loc="left", fontsize=10)
    for name in ("descriptors", "threads", "processes"):
        counts.plot(minutes, [getattr(it, name) for it in samples], label=name)
    counts.set_title("open", loc="left", fontsize=10)
    by_minute: dict[int, list[float]] = {}
    for it in asked:
        if it.first_s is not None:
            by_minute.setdefault(int(it.began_s // 60), []).append(1000 * (it.first_s - it.began_s))
    full = {minute: values for minute, values in sorted(by_minute.items()) if len(values) > 10}
    times.plot(list(full), [statistics.median(values) for values in full.values()], label="median")
    times.plot(
        list(full), [statistics.quantiles(values, n=100)[98] for values in full.values()], label="99th percentile"
    )
    times.set_yscale("log")
    times.set_title("ms to the first token, by minute", loc="left", fontsize=10)
    for axes in (memory, counts, times):
        axes.set_xlabel("minutes")
        axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.18))
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    began = time.monotonic()
    main()
    print(f"took {time.monotonic() - began:.0f} s")
