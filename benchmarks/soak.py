"""Mixed traffic for half an hour: does any resource grow, does anything slow down or get stuck?

`python -m benchmarks.soak` runs the deployment of `benchmarks.faults` (two engines, an object store, a Redis, callers
with keys). Callers request every adapter while one adapter is republished every few seconds. Other callers disconnect
in the middle of a stream, read slowly, or send invalid requests. Memory, descriptors, threads and processes are
sampled.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import statistics
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.faults.callers import Callers, RequestResult, client_of, request
from benchmarks.faults.run import Publisher
from benchmarks.faults.testbed import PARTS, Testbed, testbed
from benchmarks.hostile.requests import bad_requests
from benchmarks.plotting import pyplot, save
from benchmarks.progress import step
from benchmarks.record import RESULTS, Figure, print_figures, write_result

SAMPLE_EVERY_S = 5.0
_SAMPLES_PER_LINE = 6  # of progress: a line every half minute
_DISCONNECTING_CALLERS, _SLOW_CALLERS = 2, 1
_DISCONNECT_AFTER_S = 0.05
_READ_PAUSE_S = 0.05
_PAUSE_BETWEEN_S = 0.2


@dataclass(frozen=True)
class Sample:
    """What the processes of the server hold at `at_s` seconds since the load began."""

    at_s: float
    memory_bytes: int
    descriptors: int
    threads: int
    processes: int
    memory_by_part: dict[str, int]


@dataclass
class Soak:
    testbed: Testbed
    callers: Callers
    publisher: Publisher
    samples: list[Sample] = field(default_factory=list)
    disconnected: int = 0  # streams that a caller ended early
    slow_reads: int = 0  # streams that were read slowly to the end
    bad: Counter[str] = field(default_factory=Counter)  # invalid requests by the class of their status, as `4xx`

    async def run(self, seconds: float) -> None:
        async with self.callers.running():
            work = [
                self.publisher.publish_repeatedly(),
                self._sample_repeatedly(),
                self._send_bad_input_repeatedly(),
                *(self._disconnect_repeatedly() for _ in range(_DISCONNECTING_CALLERS)),
                *(self._read_slowly_repeatedly() for _ in range(_SLOW_CALLERS)),
            ]
            tasks = [asyncio.create_task(coroutine) for coroutine in work]
            await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
            for task in tasks:
                if task.done():
                    task.result()
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _sample_repeatedly(self) -> None:
        while True:
            self.samples.append(await asyncio.to_thread(take_sample, self.testbed, self.callers.now()))
            if len(self.samples) % _SAMPLES_PER_LINE == 0:
                step(
                    f"{len(self.callers.results)} requests, {len(self.publisher.acknowledged)} swaps, "
                    f"{self.samples[-1].memory_bytes >> 20} MiB"
                )
            await asyncio.sleep(SAMPLE_EVERY_S)

    async def _disconnect_repeatedly(self) -> None:
        for turn in itertools.count():
            body = request(self.callers.model(turn)) | {"stream": True, "max_tokens": 200}
            with contextlib.suppress(httpx.HTTPError):
                async with self._streaming(body):
                    await asyncio.sleep(_DISCONNECT_AFTER_S)
                self.disconnected += 1
            await asyncio.sleep(_PAUSE_BETWEEN_S)

    async def _read_slowly_repeatedly(self) -> None:
        for turn in itertools.count():
            body = request(self.callers.model(turn)) | {"stream": True, "max_tokens": 40}
            with contextlib.suppress(httpx.HTTPError):
                async with self._streaming(body) as response:
                    async for _ in response.aiter_raw(64):
                        await asyncio.sleep(_READ_PAUSE_S)
                self.slow_reads += 1

    @contextlib.asynccontextmanager
    async def _streaming(self, body: dict[str, Any]) -> AsyncIterator[httpx.Response]:
        async with (
            client_of(self.callers.url, self.callers.key) as client,
            client.stream("POST", "/v1/completions", json=body) as response,
        ):
            yield response

    async def _send_bad_input_repeatedly(self) -> None:
        for bad in itertools.cycle(bad_requests()):
            with contextlib.suppress(httpx.TransportError):
                async with client_of(self.callers.url, self.callers.key) as client:
                    answer = await client.request(bad.method, bad.path, content=bad.body, headers=bad.headers)
                    self.bad[f"{answer.status_code // 100}xx"] += 1
            await asyncio.sleep(_PAUSE_BETWEEN_S)


def take_sample(testbed: Testbed, at_s: float) -> Sample:
    memory, descriptors, threads, processes = Counter[str](), 0, 0, 0
    for process in testbed.children():
        with contextlib.suppress(psutil.Error), process.oneshot():
            name = f"{process.name()} {' '.join(process.cmdline())}"
            part = next((part for part, words in PARTS.items() if words in name), "other")
            memory[part] += process.memory_info().rss
            descriptors += process.num_fds()
            threads += process.num_threads()
            processes += 1
    return Sample(round(at_s, 1), memory.total(), descriptors, threads, processes, dict(memory))


def growth(values: Sequence[float]) -> float:
    """The median of the last third of `values` over that of the third before it. The first third is warm-up."""
    third = len(values) // 3
    return statistics.median(values[-third:]) / statistics.median(values[third : 2 * third])


def figures(soak: Soak, seconds: float) -> dict[str, Figure]:
    samples, results = soak.samples, soak.callers.results
    outcomes = Counter(result.outcome for result in results)
    in_order = sorted(results, key=lambda result: result.began_s)
    first = [result.first_s - result.began_s for result in in_order if result.first_s is not None]
    return {
        "minutes": Figure(seconds / 60, "min"),
        "requests": Figure(len(results), "requests"),
        "failed_requests": Figure(len(results) - outcomes["answered"], "requests", "<= 0"),
        "wrong_answers": Figure(outcomes["wrong"], "answers", "<= 0"),
        "swaps": Figure(len(soak.publisher.acknowledged), "swaps"),
        "swaps_refused": Figure(len(soak.publisher.refused), "swaps", "<= 0"),
        "callers_that_left": Figure(soak.disconnected, "requests"),
        "slow_readers": Figure(soak.slow_reads, "requests"),
        "bad_inputs": Figure(soak.bad.total(), "requests"),
        "bad_inputs_with_a_server_error": Figure(soak.bad["5xx"], "requests", "<= 0"),
        "memory_growth_ratio": Figure(growth([sample.memory_bytes for sample in samples]), "ratio", "<= 1.05"),
        "descriptor_growth_ratio": Figure(growth([sample.descriptors for sample in samples]), "ratio", "<= 1.05"),
        "thread_growth_ratio": Figure(growth([sample.threads for sample in samples]), "ratio", "<= 1.05"),
        "process_growth": Figure(samples[-1].processes - samples[len(samples) // 3].processes, "processes", "<= 0"),
        "first_token_growth_ratio": Figure(growth(first), "ratio", "<= 1.1"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30, help="default 30; a shorter run writes no result")
    minutes = parser.parse_args().minutes
    step("starting two engines, an object store and a Redis")
    with tempfile.TemporaryDirectory(prefix="graft-soak-") as directory, testbed(Path(directory)) as running:
        soak = asyncio.run(run_soak(running, 60 * minutes))
    measured = figures(soak, 60 * minutes)
    if minutes < 30:
        print_figures(measured)
        return
    failed = [result for result in soak.callers.results if result.outcome != "answered"]
    details = {
        "samples": [asdict(sample) for sample in soak.samples[::6]],
        "reasons": dict(Counter(result.detail for result in failed).most_common(5)),
        "failed_at_s": [round(result.began_s, 1) for result in failed][:20],
    }
    write_result("soak", measured, "make soak", details)
    draw(soak.samples, soak.callers.results, RESULTS / "soak.png")


async def run_soak(running: Testbed, seconds: float) -> Soak:
    step("the server is ready; recording the expected answers")
    await running.learn_expected_answers()
    soak = Soak(running, running.callers(workers=4), Publisher(running))
    await soak.run(seconds)
    return soak


def draw(samples: Sequence[Sample], results: Sequence[RequestResult], path: Path) -> None:
    """Memory by part, counts of descriptors, threads and processes, and the time to first token, by minute."""
    figure, (memory, counts, times) = pyplot().subplots(1, 3, figsize=(13, 3.6), constrained_layout=True)
    minutes = [sample.at_s / 60 for sample in samples]
    for part in sorted({part for sample in samples for part in sample.memory_by_part}):
        memory.plot(minutes, [sample.memory_by_part.get(part, 0) / 2**20 for sample in samples], label=part)
    memory.set_title("MiB resident", loc="left", fontsize=10)
    for name in ("descriptors", "threads", "processes"):
        counts.plot(minutes, [getattr(sample, name) for sample in samples], label=name)
    counts.set_title("open", loc="left", fontsize=10)
    by_minute: dict[int, list[float]] = {}
    for result in results:
        if result.first_s is not None:
            by_minute.setdefault(int(result.began_s // 60), []).append(1000 * (result.first_s - result.began_s))
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
    save(figure, (memory, counts, times), path)


if __name__ == "__main__":
    main()
