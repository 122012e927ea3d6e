"""Adapters under load: hot-swaps, cold starts, many registered adapters, more adapters than slots; also on bare vLLM.

`python -m benchmarks.swap` builds a tiny model with two QLoRA revisions whose texts differ, serves it on two engines
and publishes the revisions in turn under a closed-loop load. Then it does the same on two of vLLM's own API servers
with `load_inplace`. Cold starts are measured on a real model of 135 M parameters.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import httpx

from benchmarks import adapters, tiers
from benchmarks.load import ClosedLoopLoad, ask, first_token_s, http_client, p99
from benchmarks.progress import step
from benchmarks.record import RESULTS, Figure, print_figures, write_result
from benchmarks.servers import ENGINE_THREADS, AdapterCapacity, Graft, bare, graft, load_bare
from benchmarks.swap_picture import draw
from examples.traffic import Answer, RevisionInterval, SwapReport

PROMPT = "the rain in spain"
CAPACITY = AdapterCapacity(slots=2, resident=4)
WORKERS = 6
MAX_TOKENS = 10
REPLICAS = 2
ROLLBACKS = 20
_SWAPS_PER_LINE = 10  # of progress


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    swaps: int
    answers_each: int  # answers to wait for after each swap
    rest_answers: int  # answers before the first swap
    requests: int  # per latency that is compared
    cold_starts: int
    seconds: float  # per throughput that is compared
    registered: tuple[int, ...]


FULL = Effort(
    swaps=100, answers_each=6, rest_answers=600, requests=300, cold_starts=24, seconds=20, registered=(10, 1000, 10_000)
)
QUICK = Effort(
    swaps=6, answers_each=4, rest_answers=60, requests=40, cold_starts=6, seconds=4, registered=(10, 100, 1000)
)


@dataclass
class Swaps:
    """The answers under load, the interval in which each revision was current, and the duration of each swap."""

    answers: list[Answer]
    intervals: list[RevisionInterval]
    durations_s: list[float]

    def report(self, texts: dict[str, str]) -> SwapReport:
        return SwapReport.of(self.answers, self.intervals, lambda revision, text: texts.get(revision) == text)

    @property
    def p99_ratio(self) -> float:
        """p99 of the time to first token during the swaps over that before the first swap."""
        before = [answer for answer in self.answers if self.intervals[0].covers(answer)]
        after = [answer for answer in self.answers if answer.began_s > self.intervals[0].until_s]
        return p99(first_token_s(after)) / p99(first_token_s(before))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a short run of every part; writes no result")
    quick = parser.parse_args().quick
    effort = QUICK if quick else FULL
    os.environ.update(ENGINE_THREADS)
    with tempfile.TemporaryDirectory() as directory:
        figures, swaps, texts = measure(effort, Path(directory))
    if quick:
        print_figures(figures)
        return
    write_result("swap", figures, "make bench-swap")
    draw(swaps, texts, RESULTS / "swap.png")


def measure(effort: Effort, home: Path) -> tuple[dict[str, Figure], dict[str, Swaps], dict[str, str]]:
    """Measure every part, one server after another."""
    tiny = adapters.build_tiny_adapters(home / "tiny")
    figures: dict[str, Figure] = {}
    with ExitStack() as stack:
        server = stack.enter_context(graft([tiny.first], home / "swaps", REPLICAS, CAPACITY))
        server.store_artifact(tiny.second)
        graft_swaps, texts, idle = asyncio.run(swap_graft(server, tiny, effort))
        rollbacks_s = asyncio.run(roll_back(server, tiny))
    with bare(tiny.model, home, REPLICAS, CAPACITY) as urls:
        bare_swaps, bare_load_s = asyncio.run(swap_bare(urls, tiny, texts, effort))
        bare_rate = asyncio.run(tiers.bare_throughput(urls[0], tiny, CAPACITY, effort.seconds))
    figures |= swap_figures(graft_swaps, bare_swaps, texts, idle, rollbacks_s, bare_load_s)
    with graft([tiny.first], home / "tiers", 1, CAPACITY) as server:
        server.store_artifact(tiny.second)
        rate = asyncio.run(tiers.throughput(server, tiny, CAPACITY, effort.seconds))
        figures["working_set_throughput_over_bare"] = Figure(rate / bare_rate, "ratio")
        with graft([tiny.first], home / "beside", 1, CAPACITY) as reference:
            figures |= asyncio.run(tiers.registered(server, reference, tiny, effort.registered, effort.requests))
    figures |= tiers.cold_starts(home, effort.cold_starts)
    return figures, {"Graft: publish": graft_swaps, "vLLM: load_inplace": bare_swaps}, texts


async def swap_graft(
    server: Graft, tiny: adapters.TinyAdapters, effort: Effort
) -> tuple[Swaps, dict[str, str], list[dict[str, float]]]:
    candidates = [tiny.candidate(path, tiny.name) for path in (tiny.second, tiny.first)]
    async with http_client() as client:
        texts = {}
        idle = []
        for number in range(10):
            idle.append(await server.publish(client, candidates[number % 2]))
            revision = candidates[number % 2].adapter.engine_name
            texts[revision] = (await ask(client, server.url, revision, PROMPT, MAX_TOKENS, 0)).text

        async def swap(number: int) -> str:
            return str((await server.publish(client, candidates[number % 2]))["revision"])

        load = ClosedLoopLoad(client, [server.url], [tiny.name], PROMPT, WORKERS, MAX_TOKENS)
        first = candidates[1].adapter.engine_name
        return await under_load(load, first, swap, effort), texts, idle


async def roll_back(server: Graft, tiny: adapters.TinyAdapters) -> list[float]:
    """Seconds of each rollback call. Both revisions are pinned, so that the replicas hold both, as after a publish."""
    revisions = [tiny.candidate(path, tiny.name).adapter for path in (tiny.first, tiny.second)]
    async with http_client() as client:
        for revision in revisions:
            await server.change(client, "pin", revision)
        durations_s = [await server.change(client, "rollback", revisions[number % 2]) for number in range(ROLLBACKS)]
        for revision in revisions:
            await server.change(client, "unpin", revision)
    return durations_s


async def swap_bare(
    urls: list[str], tiny: adapters.TinyAdapters, texts: dict[str, str], effort: Effort
) -> tuple[Swaps, float]:
    """The same with vLLM's `load_inplace`, which replaces an adapter under its name, on one server after the other."""
    revisions = [tiny.candidate(path, tiny.name).adapter.engine_name for path in (tiny.second, tiny.first)]
    paths = [path / "adapter" for path in (tiny.second, tiny.first)]
    async with http_client() as client:
        loads = [await load_bare(client, urls[0], f"fresh-{number}", paths[0]) for number in range(10)]
        for url in urls:
            await load_bare(client, url, tiny.name, paths[1])

        async def swap(number: int) -> str:
            for url in urls:
                await load_bare(client, url, tiny.name, paths[number % 2], inplace=True)
            return revisions[number % 2]

        load = ClosedLoopLoad(client, urls, [tiny.name], PROMPT, WORKERS, MAX_TOKENS)
        swaps = await under_load(load, revisions[1], swap, effort)
    revision_of = {text: revision for revision, text in texts.items()}
    # vLLM's answers don't name the revision; the text identifies it, or shows that it was neither.
    swaps.answers = [
        replace(answer, revisions=frozenset({revision_of.get(answer.text, "neither")})) for answer in swaps.answers
    ]
    return swaps, statistics.median(loads)


async def under_load(load: ClosedLoopLoad, first: str, swap: tiers.Swap, effort: Effort) -> Swaps:
    intervals, durations_s = [RevisionInterval(first, since_s=0)], []
    async with load.running():
        await load.answered(20, 0)
        intervals[0].since_s = load.now()
        await load.answered(effort.rest_answers, intervals[0].since_s)
        for number in range(effort.swaps):
            intervals[-1].until_s = load.now()
            revision = await swap(number)
            intervals.append(RevisionInterval(revision, since_s=load.now()))
            durations_s.append(intervals[-1].since_s - intervals[-2].until_s)
            await load.answered(effort.answers_each, intervals[-1].since_s)
            if (number + 1) % _SWAPS_PER_LINE == 0:
                step(f"{number + 1} of {effort.swaps} swaps, {len(load.answers)} requests")
    return Swaps(load.answers, intervals, durations_s)


def swap_figures(
    graft_swaps: Swaps,
    bare_swaps: Swaps,
    texts: dict[str, str],
    idle: list[dict[str, float]],
    rollbacks_s: list[float],
    bare_load_s: float,
) -> dict[str, Figure]:
    graft_report, bare_report = graft_swaps.report(texts), bare_swaps.report(texts)
    published_s = [publish["staged_s"] + publish["promoted_s"] for publish in idle]
    return {
        "replicas": Figure(REPLICAS, "engines"),
        "swaps": Figure(len(graft_swaps.durations_s), "swaps"),
        "requests": Figure(graft_report.requests, "requests"),
        "failed_requests": Figure(graft_report.failed, "requests", "<= 0"),
        "mixed_or_stale_responses": Figure(graft_report.mixed + graft_report.stale, "answers", "<= 0"),
        "p99_ttft_ratio": Figure(graft_swaps.p99_ratio, "ratio"),
        "swap_under_load_s": Figure.of(graft_swaps.durations_s, "s"),
        "publish_overhead_s": Figure.of([seconds - bare_load_s for seconds in published_s], "s", "<= 1"),
        "rollback_ms": Figure.of([1000 * seconds for seconds in rollbacks_s], "ms", "<= 100"),
        "alias_switch_ms": Figure.of([1000 * publish["promoted_s"] for publish in idle], "ms"),
        "bare_requests": Figure(bare_report.requests, "requests"),
        "bare_failed_requests": Figure(bare_report.failed, "requests"),
        "bare_mixed_or_stale_responses": Figure(bare_report.mixed + bare_report.stale, "answers"),
        "bare_p99_ttft_ratio": Figure(bare_swaps.p99_ratio, "ratio"),
        "bare_swap_under_load_s": Figure.of(bare_swaps.durations_s, "s"),
    }


if __name__ == "__main__":
    try:
        main()
    except httpx.HTTPStatusError as error:
        raise SystemExit(f"{error}: {error.response.text}") from error
