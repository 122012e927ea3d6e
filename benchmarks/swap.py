"""Adapters under load: hot-swaps, cold starts, many registered ones, more than fit; beside bare vLLM.

`python -m benchmarks.swap` makes a tiny model with two QLoRA revisions that answer unmistakably differently, serves
it on two engines and publishes the revisions in turn while it is asked without a pause. The same then on two of
vLLM's own API servers with `load_inplace`. Cold starts are measured on a real model of 135 M parameters.
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
from benchmarks.load import Load, ask, first_token_s, http, p99
from benchmarks.picture import draw
from benchmarks.record import Figure, write_result
from benchmarks.servers import ENGINE_THREADS, Graft, Room, bare, graft, load_bare
from examples.traffic import Answer, Reign, SwapReport

PROMPT = "the rain in spain"
ROOM = Room(slots=2, resident=4)
WORKERS = 6
MAX_TOKENS = 10
REPLICAS = 2
ROLLBACKS = 20


@dataclass(frozen=True)
class Effort:
    swaps: int
    answers_each: int
    rest_answers: int
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
    """A load, the reigns of the revisions, and how long each swap took."""

    answers: list[Answer]
    reigns: list[Reign]
    took_s: list[float]

    def report(self, texts: dict[str, str]) -> SwapReport:
        return SwapReport.of(self.answers, self.reigns, lambda revision, text: texts.get(revision) == text)

    @property
    def p99_ratio(self) -> float:
        """Time to the first token while swaps follow one another ÷ before the first one."""
        before = [it for it in self.answers if self.reigns[0].covers(it)]
        after = [it for it in self.answers if it.began_s > self.reigns[0].until_s]
        return p99(first_token_s(after)) / p99(first_token_s(before))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few of everything, to try it; writes no result")
    quick = parser.parse_args().quick
    effort = QUICK if quick else FULL
    os.environ.update(ENGINE_THREADS)
    with tempfile.TemporaryDirectory() as directory:
        figures, swaps, texts = measure(effort, Path(directory))
    if quick:
        for name, figure in figures.items():
            print(f"{name:40} {figure.value:.4g} {figure.unit}")
        return
    write_result("swap", figures, "make bench-swap")
    draw(swaps, texts, Path(__file__).parent / "results" / "swap.png")


def measure(effort: Effort, home: Path) -> tuple[dict[str, Figure], dict[str, Swaps], dict[str, str]]:
    """Everything, one server after another."""
    tiny = adapters.tiny(home / "tiny")
    figures: dict[str, Figure] = {}
    with ExitStack() as stack:
        server = stack.enter_context(graft([tiny.first], home / "swaps", REPLICAS, ROOM))
        server.store(tiny.second)
        ours, texts, idle = asyncio.run(swap_ours(server, tiny, effort))
        rollbacks_s = asyncio.run(roll_back(server, tiny))
    with bare(tiny.model, home, REPLICAS, ROOM) as urls:
        theirs, bare_load_s = asyncio.run(swap_bare(urls, tiny, texts, effort))
        bare_rate = asyncio.run(tiers.bare_throughput(urls[0], tiny, ROOM, effort.seconds))
    figures |= swap_figures(ours, theirs, texts, idle, rollbacks_s, bare_load_s)
    with graft([tiny.first], home / "tiers", 1, ROOM) as server:
        server.store(tiny.second)
        rate = asyncio.run(tiers.throughput(server, tiny, ROOM, effort.seconds))
        figures["working_set_throughput_over_bare"] = Figure(rate / bare_rate, "ratio")
        with graft([tiny.first], home / "beside", 1, ROOM) as beside:
            figures |= asyncio.run(tiers.registered(server, beside, tiny, effort.registered, effort.requests))
    figures |= tiers.cold_starts(home, effort.cold_starts)
    return figures, {"Graft: publish": ours, "vLLM: load_inplace": theirs}, texts


async def swap_ours(
    server: Graft, tiny: adapters.Tiny, effort: Effort
) -> tuple[Swaps, dict[str, str], list[dict[str, float]]]:
    candidates = [tiny.candidate(path, tiny.name) for path in (tiny.second, tiny.first)]
    async with http() as client:
        texts = {}
        idle = []
        for number in range(10):
            idle.append(await server.publish(client, candidates[number % 2]))
            revision = candidates[number % 2].adapter.engine_name
            texts[revision] = (await ask(client, server.url, revision, PROMPT, MAX_TOKENS, 0)).text

        async def swap(number: int) -> str:
            return str((await server.publish(client, candidates[number % 2]))["revision"])

        load = Load(client, [server.url], [tiny.name], PROMPT, WORKERS, MAX_TOKENS)
        first = candidates[1].adapter.engine_name
        return await under_load(load, first, swap, effort), texts, idle


async def roll_back(server: Graft, tiny: adapters.Tiny) -> list[float]:
    """Seconds from the call to its answer, the replicas holding both revisions as they do after a publish."""
    revisions = [tiny.candidate(path, tiny.name).adapter for path in (tiny.first, tiny.second)]
    async with http() as client:
        for revision in revisions:
            await server.change(client, "pin", revision)
        took_s = [await server.change(client, "rollback", revisions[number % 2]) for number in range(ROLLBACKS)]
        for revision in revisions:
            await server.change(client, "unpin", revision)
    return took_s


async def swap_bare(urls: list[str], tiny: adapters.Tiny, texts: dict[str, str], effort: Effort) -> tuple[Swaps, float]:
    """The same with vLLM's way of replacing an adapter under its name, one server after the other."""
    revisions = [tiny.candidate(path, tiny.name).adapter.engine_name for path in (tiny.second, tiny.first)]
    paths = [path / "adapter" for path in (tiny.second, tiny.first)]
    async with http() as client:
        loads = [await load_bare(client, urls[0], f"fresh-{number}", paths[0]) for number in range(10)]
        for url in urls:
            await load_bare(client, url, tiny.name, paths[1])

        async def swap(number: int) -> str:
            for url in urls:
                await load_bare(client, url, tiny.name, paths[number % 2], inplace=True)
            return revisions[number % 2]

        load = Load(client, urls, [tiny.name], PROMPT, WORKERS, MAX_TOKENS)
        swaps = await under_load(load, revisions[1], swap, effort)
    named = {text: revision for revision, text in texts.items()}
    # Its answers don't say which revision gave them: the text does, or that it was neither.
    swaps.answers = [replace(it, revisions=frozenset({named.get(it.text, "neither")})) for it in swaps.answers]
    return swaps, statistics.median(loads)


async def under_load(load: Load, first: str, swap: tiers.Swap, effort: Effort) -> Swaps:
    reigns, took_s = [Reign(first, since_s=0)], []
    async with load.running():
        await load.answered(20, 0)
        reigns[0].since_s = load.now()
        await load.answered(effort.rest_answers, reigns[0].since_s)
        for number in range(effort.swaps):
            reigns[-1].until_s = load.now()
            revision = await swap(number)
            reigns.append(Reign(revision, since_s=load.now()))
            took_s.append(reigns[-1].since_s - reigns[-2].until_s)
            await load.answered(effort.answers_each, reigns[-1].since_s)
    return Swaps(load.answers, reigns, took_s)


def swap_figures(
    ours: Swaps,
    theirs: Swaps,
    texts: dict[str, str],
    idle: list[dict[str, float]],
    rollbacks_s: list[float],
    bare_load_s: float,
) -> dict[str, Figure]:
    mine, other = ours.report(texts), theirs.report(texts)
    published_s = [it["staged_s"] + it["promoted_s"] for it in idle]
    return {
        "replicas": Figure(REPLICAS, "engines"),
        "swaps": Figure(len(ours.took_s), "swaps"),
        "requests": Figure(mine.requests, "requests"),
        "failed_requests": Figure(mine.failed, "requests", "<= 0"),
        "mixed_or_stale_responses": Figure(mine.mixed + mine.stale, "answers", "<= 0"),
        "p99_ttft_ratio": Figure(ours.p99_ratio, "ratio"),
        "swap_under_load_s": Figure.of(ours.took_s, "s"),
        "publish_overhead_s": Figure.of([it - bare_load_s for it in published_s], "s", "<= 1"),
        "rollback_ms": Figure.of([1000 * it for it in rollbacks_s], "ms", "<= 100"),
        "alias_switch_ms": Figure.of([1000 * it["promoted_s"] for it in idle], "ms"),
        "bare_requests": Figure(other.requests, "requests"),
        "bare_failed_requests": Figure(other.failed, "requests"),
        "bare_mixed_or_stale_responses": Figure(other.mixed + other.stale, "answers"),
        "bare_p99_ttft_ratio": Figure(theirs.p99_ratio, "ratio"),
        "bare_swap_under_load_s": Figure.of(theirs.took_s, "s"),
    }


if __name__ == "__main__":
    try:
        main()
    except httpx.HTTPStatusError as error:
        raise SystemExit(f"{error}: {error.response.text}") from error
