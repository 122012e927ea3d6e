"""When to merge and when to keep adapters together, as curves: a simulation, no measurement.

`python -m benchmarks.merge_or_not` writes results/merge_or_not.json and .png within a minute. The cost of a cold
start is that of results/swap.json; the other costs are the defaults of `python -m serve advise`, and assumptions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.record import RESULTS, Figure, write_result
from serve.advice import Advice, Costs, advise, plan
from serve.simulate import Pool
from serve.traffic import Asked, zipf

PLACES, TOKENS, TOKEN_S = 64, 200, 0.025
RATE = 20.0  # requests a second, of all adapters
COUNTS = (1, 2, 3, 5, 10, 30, 100, 300, 1000, 3000, 10_000)
SLOTS = (8, 32)
FILLED = tuple(number / 20 for number in range(1, 61))  # replicas' worth of one adapter's work
OVERHEADS = (1.1, 1.2, 1.4)
_COLOURS = ("#3b6fb6", "#2a9d5c", "#e08a1e")


def costs(slots: int, overhead: float = 1.2) -> Costs:
    cold_ms = json.loads((RESULTS / "swap.json").read_text())["figures"]["cold_minus_warm_ms"]["value"]
    pool = Pool(1, PLACES, slots, resident=8 * slots, cold_s=cold_ms / 1000)
    return Costs(pool, overhead, goal_s=0.5, requests=10_000)


def main() -> None:
    by_count = {
        slots: [advise(zipf(count, RATE, 1.0, TOKENS, TOKEN_S), costs(slots)) for count in COUNTS] for slots in SLOTS
    }
    by_traffic = {overhead: [ratio(filled, overhead) for filled in FILLED] for overhead in OVERHEADS}
    write_result("merge_or_not", figures(by_count, by_traffic), "python -m benchmarks.merge_or_not")
    draw(by_count, by_traffic, RESULTS / "merge_or_not.png")


def ratio(filled: float, overhead: float) -> float:
    """GPUs of one merged deployment over the share of a large pool that the same traffic takes."""
    service_s = TOKENS * TOKEN_S
    asked = Asked("one", filled * PLACES / service_s, service_s, TOKENS)
    return plan([asked], frozenset({"one"}), costs(SLOTS[0], overhead)).gpus / filled


def figures(by_count: Mapping[int, Sequence[Advice]], by_traffic: Mapping[float, Sequence[float]]) -> dict[str, Figure]:
    found = {}
    for slots, advices in by_count.items():
        for count, it in zip(COUNTS, advices, strict=True):
            name = f"slots_{slots}_adapters_{count}"
            found[f"{name}_together_gpus"] = Figure(it.together.gpus, "GPUs")
            found[f"{name}_apart_gpus"] = Figure(it.apart.gpus, "GPUs")
            if it.together.pool:
                found[f"{name}_cold"] = Figure(it.together.pool.cold, "share")
                found[f"{name}_wait_p99_ms"] = Figure(it.together.pool.wait_p99_s * 1000, "ms")
    for overhead, ratios in by_traffic.items():
        pays = [filled for filled, it in zip(FILLED, ratios, strict=True) if it < 1]
        if pays:
            found[f"overhead_{overhead}_merging_pays_from"] = Figure(min(pays), "replicas of traffic")
    return found


def draw(by_count: Mapping[int, Sequence[Advice]], by_traffic: Mapping[float, Sequence[float]], path: Path) -> None:
    """Left: the price of tokens by the number of adapters. Right: that of one adapter by its own traffic."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.4), constrained_layout=True)
    apart = [it.apart.per_million_tokens for it in by_count[SLOTS[0]]]
    left.loglog(COUNTS, apart, "o-", color="0.5", label="one merged deployment each")
    for colour, (slots, advices) in zip(_COLOURS, by_count.items(), strict=False):
        prices = [it.together.per_million_tokens for it in advices]
        left.loglog(COUNTS, prices, "o-", color=colour, label=f"together, {slots} slots")
    left.set_title(f"GPU-hours per million tokens, {RATE:g} requests/s over all", loc="left", fontsize=10)
    left.set_xlabel("adapters (popularity by Zipf's law)")
    for colour, (overhead, ratios) in zip(_COLOURS, by_traffic.items(), strict=False):
        right.plot(FILLED, ratios, color=colour, label=f"a token with adapters takes {overhead} x")
    right.axhline(1, color="0.4", linewidth=1)
    right.set_ylim(0.5, 3)
    right.set_title("price merged ÷ price in a large pool (below the line: merge)", loc="left", fontsize=10)
    right.set_xlabel("one adapter's traffic, in replicas that it would fill in the pool")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
