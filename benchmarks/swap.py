"""A hot-swap under load: what it takes, and what callers notice.

`python -m benchmarks.swap` serves the example adapters on two vLLM engines, asks one of them without a pause, and
publishes its two revisions in turn; first idle, then under that load.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.record import Figure, write_result
from examples.demo import ARTIFACTS, BASE_NAME, CODE_WORDS, QUESTIONS, convert_all, make_checkpoints
from examples.server import publish, running_server
from examples.traffic import Answer, Reign, SwapReport, Traffic

REVISIONS = (ARTIFACTS / "zephyr-2", ARTIFACTS / "zephyr")
WORDS = (CODE_WORDS["zephyr-2"], CODE_WORDS["zephyr"])
REPLICAS = 2
WORKERS = 4
ANSWERS_EACH = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swaps", type=int, default=6, help="publishes under load (default 6)")
    swaps = parser.parse_args().swaps
    make_checkpoints()
    convert_all()
    with tempfile.TemporaryDirectory() as directory:
        state = Path(directory) / "state"
        options = ("--base-name", BASE_NAME, "--replicas", str(REPLICAS))
        print(f"starting {REPLICAS} engines …", flush=True)
        with running_server(
            [ARTIFACTS / "pirate", ARTIFACTS / "zephyr"], state, *options, log=Path(directory) / "log"
        ) as url:
            idle = [asyncio.run(publish(REVISIONS[number % 2], state)) for number in range(swaps)]
            traffic, reigns, loaded = asyncio.run(swap_under_load(url, state, swaps))
    write_result("swap", figures(idle, loaded, traffic, reigns), "make bench-swap")
    draw(traffic, reigns, Path(__file__).parent / "results" / "swap.png")


async def swap_under_load(url: str, state: Path, swaps: int) -> tuple[Traffic, list[Reign], list[dict[str, Any]]]:
    """The load, the reigns of the revisions, and what each publish answered. The first reign is undisturbed."""
    first = await publish(REVISIONS[1], state)
    traffic = Traffic(url, "zephyr", QUESTIONS[0], workers=WORKERS, max_tokens=20)
    running = asyncio.create_task(traffic.run())
    reigns = [Reign(first["revision"], since_s=0)]
    published = []
    await traffic.answered(2 * ANSWERS_EACH)
    for number in range(swaps):
        reigns[-1].until_s = traffic.now()
        published.append(await publish(REVISIONS[number % 2], state))
        reigns.append(Reign(published[-1]["revision"], since_s=traffic.now()))
        await traffic.answered(ANSWERS_EACH, since_s=reigns[-1].since_s)
    traffic.stop()
    await running
    return traffic, reigns, published


def figures(
    idle: list[dict[str, Any]], loaded: list[dict[str, Any]], traffic: Traffic, reigns: list[Reign]
) -> dict[str, Figure]:
    words = dict(zip((reigns[1].revision, reigns[0].revision), WORDS, strict=True))
    report = SwapReport.of(traffic.answers, reigns, lambda revision, text: words[revision] in text.lower())
    before = [latency(it) for it in traffic.answers if reigns[0].covers(it)]
    after = [latency(it) for it in traffic.answers if it.began_s > reigns[0].until_s]
    return {
        "requests": Figure(report.requests, "requests"),
        "failed_requests": Figure(report.failed, "requests", "<= 0"),
        "mixed_answers": Figure(report.mixed, "answers", "<= 0"),
        "stale_answers": Figure(report.stale, "answers", "<= 0"),
        "idle_staged_s": Figure.of([it["staged_s"] for it in idle], "s"),
        "idle_switched_s": Figure.of([it["promoted_s"] for it in idle], "s"),
        "loaded_staged_s": Figure.of([it["staged_s"] for it in loaded], "s"),
        "loaded_switched_s": Figure.of([it["promoted_s"] for it in loaded], "s"),
        "latency_p50_swapping_over_before": Figure(
            statistics.median(after) / statistics.median(before), "ratio", spread=(min(after), max(after))
        ),
    }


def latency(answer: Answer) -> float:
    return answer.ended_s - answer.began_s


def draw(traffic: Traffic, reigns: list[Reign], path: Path) -> None:
    """Every request as a line from its begin to its end, coloured by the revision that answered."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    colours = dict(zip((reigns[0].revision, reigns[1].revision), ("#3b6fb6", "#e08a1e"), strict=True))
    figure, axes = pyplot.subplots(figsize=(11, 4.2), constrained_layout=True)
    for row, it in enumerate(sorted(traffic.answers, key=lambda each: each.began_s)):
        colour = colours.get(next(iter(it.revisions), ""), "#c8452f")
        axes.plot([it.began_s, it.ended_s], [row, row], color=colour, linewidth=2)
    for before, after in itertools.pairwise(reigns):
        axes.axvspan(before.until_s, after.since_s, color="0.85", zorder=0)
    for revision, colour in colours.items():
        axes.plot([], [], color=colour, linewidth=2, label=revision)
    axes.set_xlabel(f"seconds (grey: a publish is running; {REPLICAS} engines, {WORKERS} callers)")
    axes.set_ylabel("requests in order of their begin")
    axes.set_title("Each request, by the revision that answered it", loc="left")
    axes.legend(loc="upper left", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
