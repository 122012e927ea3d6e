"""When to merge adapters and when to serve them on a shared base: a simulation, not a measurement.

`python -m benchmarks.merge_or_not` writes results/merge_or_not.json and .png within a minute. The cost of a cold start
comes from results/swap.json; the other costs are the defaults of `python -m serve advise`, which are assumptions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.plotting import pyplot, save
from benchmarks.record import RESULTS, Figure, write_result
from serve.capacity.advice import Advice, Costs, advise, plan_deployments
from serve.capacity.simulate import ReplicaPool
from serve.capacity.traffic import ModelTraffic, zipf

CONCURRENT_REQUESTS, TOKENS, TOKEN_S = 64, 200, 0.025
RATE = 20.0  # requests per second, of all adapters together
COUNTS = (1, 2, 3, 5, 10, 30, 100, 300, 1000, 3000, 10_000)
SLOTS = (8, 32)
FILLED = tuple(number / 20 for number in range(1, 61))  # traffic of one adapter, in replicas that it would fill
OVERHEADS = (1.1, 1.2, 1.4)
_COLOURS = ("#3b6fb6", "#2a9d5c", "#e08a1e")


def costs(slots: int, overhead: float = 1.2) -> Costs:
    cold_ms = json.loads((RESULTS / "swap.json").read_text())["figures"]["cold_minus_warm_ms"]["value"]
    pool = ReplicaPool(1, CONCURRENT_REQUESTS, slots, resident=8 * slots, cold_s=cold_ms / 1000)
    return Costs(pool, overhead, goal_s=0.5, requests=10_000)


def main() -> None:
    by_count = {
        slots: [advise(zipf(count, RATE, 1.0, TOKENS, TOKEN_S), costs(slots)) for count in COUNTS] for slots in SLOTS
    }
    by_traffic = {overhead: [ratio(filled, overhead) for filled in FILLED] for overhead in OVERHEADS}
    write_result("merge_or_not", figures(by_count, by_traffic), "python -m benchmarks.merge_or_not")
    draw(by_count, by_traffic, RESULTS / "merge_or_not.png")


def ratio(filled: float, overhead: float) -> float:
    """GPUs of a merged deployment of one adapter over the share of a large pool that its traffic takes."""
    service_s = TOKENS * TOKEN_S
    traffic = ModelTraffic("one", filled * CONCURRENT_REQUESTS / service_s, service_s, TOKENS)
    return plan_deployments([traffic], frozenset({"one"}), costs(SLOTS[0], overhead)).gpus / filled


def figures(by_count: Mapping[int, Sequence[Advice]], by_traffic: Mapping[float, Sequence[float]]) -> dict[str, Figure]:
    by_key = {}
    for slots, advices in by_count.items():
        for count, advice in zip(COUNTS, advices, strict=True):
            name = f"slots_{slots}_adapters_{count}"
            by_key[f"{name}_together_gpus"] = Figure(advice.together.gpus, "GPUs")
            by_key[f"{name}_apart_gpus"] = Figure(advice.apart.gpus, "GPUs")
            if advice.together.pool:
                by_key[f"{name}_cold"] = Figure(advice.together.pool.cold, "share")
                by_key[f"{name}_wait_p99_ms"] = Figure(advice.together.pool.wait_p99_s * 1000, "ms")
    for overhead, ratios in by_traffic.items():
        pays = [filled for filled, price_ratio in zip(FILLED, ratios, strict=True) if price_ratio < 1]
        if pays:
            by_key[f"overhead_{overhead}_merging_pays_from"] = Figure(min(pays), "replicas of traffic")
    return by_key


def draw(by_count: Mapping[int, Sequence[Advice]], by_traffic: Mapping[float, Sequence[float]], path: Path) -> None:
    """Left: price of tokens by the number of adapters. Right: relative price of merging one adapter, by its traffic."""
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(12, 4.4), constrained_layout=True)
    apart = [advice.apart.per_million_tokens for advice in by_count[SLOTS[0]]]
    left.loglog(COUNTS, apart, "o-", color="0.5", label="one merged deployment each")
    for colour, (slots, advices) in zip(_COLOURS, by_count.items(), strict=False):
        prices = [advice.together.per_million_tokens for advice in advices]
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
        axes.legend(frameon=False, fontsize=8)
    save(figure, (left, right), path)


if __name__ == "__main__":
    main()
