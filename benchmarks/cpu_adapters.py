"""Adapters on a CPU: Graft compared with vLLM's own server, in alternation, with the same model and arguments.

`python -m benchmarks.cpu_adapters` serves two fine-tunes of SmolLM2-135M over its 4-bit base. It sends long prompts one
at a time, then a closed-loop load for one adapter, and for two. Every prompt is new, so that the prefix cache has none.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from benchmarks.alternation import alternating
from benchmarks.gateway_side import kind_of
from benchmarks.load import ask, first_token_s, http_client
from benchmarks.plotting import pyplot, save
from benchmarks.process_usage import resident_bytes
from benchmarks.progress import step
from benchmarks.record import RESULTS, Figure, print_figures, write_result
from benchmarks.servers import ENGINE_THREADS, SIDES, AdapterCapacity, bare, graft
from examples.demo import ARTIFACTS, convert_all, make_checkpoints
from examples.traffic import Answer

ADAPTERS = ("pirate", "zephyr")
BASE = "base"
CAPACITY = AdapterCapacity(slots=2, resident=4)
PROMPT_TOKENS, ANSWER_TOKENS = 600, 64
CALLERS = 8
_TOKEN_IDS = range(1000, 40_000)  # ordinary tokens of this tokenizer


@dataclass(frozen=True)
class Visit:
    """The measurements of one visit to one server."""

    adapter_prompts_ms: list[float]  # time to first token
    base_prompts_ms: list[float]
    one_adapter_tokens_per_s: float
    two_adapters_tokens_per_s: float
    memory_mb: float  # peak of the engine process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short visit of each server; writes no result")
    parser.add_argument("--turns", type=int, default=3, help="visits of each server (default 3)")
    parser.add_argument("--prompts", type=int, default=8, help="long prompts a visit (default 8)")
    options = parser.parse_args()
    turns, prompts = (1, 2) if options.quick else (options.turns, options.prompts)
    os.environ.update(ENGINE_THREADS)
    make_checkpoints()
    convert_all()
    visits: dict[str, list[Visit]] = {side: [] for side in SIDES}
    for number, side in alternating(SIDES, turns):
        step(f"turn {number + 1} of {turns}: {side}")
        with tempfile.TemporaryDirectory() as home, served(side, Path(home)) as url:
            visits[side].append(asyncio.run(visit(url, prompts)))
            step(str(visits[side][-1]))
    measured = figures(visits)
    if options.quick:
        print_figures(measured)
        return
    write_result("cpu_adapters", measured, "make bench-cpu-adapters")
    draw(visits, RESULTS / "cpu_adapters.png")


@contextlib.contextmanager
def served(side: str, home: Path) -> Iterator[str]:
    artifacts = [ARTIFACTS / name for name in ADAPTERS]
    if side == "graft":
        with graft(artifacts, home, 1, CAPACITY) as server:
            yield server.url
        return
    loaded = {artifact.name: artifact / "adapter" for artifact in artifacts}
    with bare(artifacts[0] / "model", home, 1, CAPACITY, loaded) as (url,):
        yield url


async def visit(url: str, prompts: int) -> Visit:
    async with http_client() as client:
        for model in (*ADAPTERS, BASE):
            await _answer(client, url, model, 16, 2)  # warm
        return Visit(
            await _prompts_ms(client, url, ADAPTERS[0], prompts),
            await _prompts_ms(client, url, BASE, prompts),
            await _tokens_per_s(client, url, ADAPTERS[:1], prompts),
            await _tokens_per_s(client, url, ADAPTERS, prompts),
            _engine_memory_mb(),
        )


async def _prompts_ms(client: httpx.AsyncClient, url: str, model: str, count: int) -> list[float]:
    answers = [await _answer(client, url, model, PROMPT_TOKENS, 1) for _ in range(count)]
    return [1000 * seconds for seconds in first_token_s(answers)]


async def _tokens_per_s(client: httpx.AsyncClient, url: str, models: Sequence[str], rounds: int) -> float:
    async def caller(number: int) -> None:
        for _ in range(rounds):
            await _answer(client, url, models[number % len(models)], 16, ANSWER_TOKENS)

    began = time.monotonic()
    await asyncio.gather(*(caller(number) for number in range(CALLERS)))
    return CALLERS * rounds * ANSWER_TOKENS / (time.monotonic() - began)


async def _answer(client: httpx.AsyncClient, url: str, model: str, prompt_tokens: int, max_tokens: int) -> Answer:
    prompt = random.choices(_TOKEN_IDS, k=prompt_tokens)  # noqa: S311  (no secret)
    answer = await ask(client, url, model, prompt, max_tokens, 0)
    if answer.error:
        raise RuntimeError(f"{model} did not answer: {answer.error}")
    return answer


def _engine_memory_mb() -> float:
    engines = [child for child in psutil.Process().children(recursive=True) if kind_of(child) == "engine"]
    return resident_bytes("VmHWM", engines[0].pid) / 1e6


def figures(visits: dict[str, list[Visit]]) -> dict[str, Figure]:
    def paired(of: Callable[[Visit], float]) -> list[float]:
        return [
            of(graft_visit) / of(bare_visit)
            for bare_visit, graft_visit in zip(visits["bare"], visits["graft"], strict=True)
        ]

    def prompt(visit: Visit) -> float:
        return statistics.median(visit.adapter_prompts_ms)

    unit = "Graft / vLLM"
    by_key = {
        "prompt_time_ratio": Figure.of(paired(prompt), unit, "<= 1"),
        "one_adapter_throughput_ratio": Figure.of(paired(lambda visit: visit.one_adapter_tokens_per_s), unit, ">= 1"),
        "two_adapters_throughput_ratio": Figure.of(paired(lambda visit: visit.two_adapters_tokens_per_s), unit, ">= 1"),
        "engine_memory_ratio": Figure.of(paired(lambda visit: visit.memory_mb), unit, "<= 1"),
    }
    for side, side_visits in visits.items():
        by_key |= {
            f"{side}_adapter_prompt_ms": Figure.of(
                [ms for visit in side_visits for ms in visit.adapter_prompts_ms], "ms"
            ),
            f"{side}_base_prompt_ms": Figure.of([ms for visit in side_visits for ms in visit.base_prompts_ms], "ms"),
            f"{side}_one_adapter_tokens_per_s": Figure.of(
                [visit.one_adapter_tokens_per_s for visit in side_visits], "tokens/s"
            ),
            f"{side}_two_adapters_tokens_per_s": Figure.of(
                [visit.two_adapters_tokens_per_s for visit in side_visits], "tokens/s"
            ),
            f"{side}_engine_memory": Figure.of([visit.memory_mb for visit in side_visits], "MB at most"),
        }
    return by_key


def draw(visits: dict[str, list[Visit]], path: Path) -> None:
    """Bars are medians; dots are single prompts or visits."""
    panels: dict[str, Sequence[tuple[str, Callable[[Visit], list[float]]]]] = {
        f"{PROMPT_TOKENS} tokens of prompt, ms to the first token": (
            ("an adapter", lambda visit: visit.adapter_prompts_ms),
            ("the base", lambda visit: visit.base_prompts_ms),
        ),
        f"{CALLERS} callers, tokens/s": (
            ("one adapter", lambda visit: [visit.one_adapter_tokens_per_s]),
            ("two adapters", lambda visit: [visit.two_adapters_tokens_per_s]),
        ),
        "memory of the engine at its most, MB": (("", lambda visit: [visit.memory_mb]),),
    }
    figure, axes_of = pyplot().subplots(1, len(panels), figsize=(12, 3.6), constrained_layout=True)
    for axes, (title, groups) in zip(axes_of, panels.items(), strict=True):
        for number, (_, of) in enumerate(groups):
            for offset, side, colour in ((-0.2, "bare", "0.55"), (0.2, "graft", "#2a9d5c")):
                samples = [sample for visit in visits[side] for sample in of(visit)]
                label = {"bare": "vLLM's server", "graft": "Graft"}[side] if number == 0 else None
                axes.bar(number + offset, statistics.median(samples), 0.38, color=colour, label=label)
                axes.plot([number + offset] * len(samples), samples, ".", color="black", markersize=3)
        axes.set_xticks(range(len(groups)), [name for name, _ in groups])
        axes.set_title(title, loc="left", fontsize=10)
    axes_of[0].legend(frameon=False, fontsize=8)
    save(figure, axes_of, path)


if __name__ == "__main__":
    main()
