"""`python -m serve advise`: merge an adapter, or keep it with the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from serve.advice import Advice, Alone, Costs, Plan, advise, alone, slots_bound
from serve.config import EngineSettings, GatewaySettings
from serve.errors import TrafficLogInvalid
from serve.output import err, print_json, told_errors
from serve.simulate import Pool
from serve.size import STORED, Wish, adapter_bytes, fit
from serve.size_command import GPUS, memory_of, shape_of
from serve.traffic import Asked, read_log, zipf

# Measured: `cold_minus_warm_ms` of benchmarks/results/swap.json, an adapter of a model of 135 M parameters on a disk.
COLD_MS = 20.0
_MOST_ADAPTERS = 100_000
_MOST_PLACES = 256  # vLLM's --max-num-seqs
_SHOWN = 20
_PLANS = {"together": "all together", "apart": "one merged deployment each", "best": "advised"}


def add_to(app: typer.Typer) -> None:
    app.command(name="advise")(advise_)


def advise_(
    log: Annotated[Path | None, typer.Option(help="Access log, or JSON lines of time, model, tokens.")] = None,
    sample: Annotated[float, typer.Option(min=1e-6, max=1, help="Share of requests that the log holds.")] = 1.0,
    window_minutes: Annotated[float, typer.Option(min=0.1, help="The busiest part of the log decides.")] = 60,
    adapters: Annotated[int, typer.Option(min=1, max=_MOST_ADAPTERS, help="Without --log: how many.")] = 100,
    rate: Annotated[float, typer.Option(min=1e-6, help="Without --log: requests a second, of all.")] = 20,
    exponent: Annotated[float, typer.Option(min=0, max=5, help="Without --log: of Zipf's law; 0: all alike.")] = 1.0,
    tokens: Annotated[float, typer.Option(min=1, help="Without --log: tokens of a mean answer.")] = 200,
    token_ms: Annotated[float, typer.Option(min=0.001, help="One token of one request, in a full batch.")] = 25,
    adapter_overhead: Annotated[
        float, typer.Option(min=1, help="Time of a token with adapters ÷ of a merged model.")
    ] = 1.2,
    places: Annotated[int, typer.Option(min=1, help="Requests that an engine works on at a time.")] = 64,
    max_active_adapters: Annotated[int, typer.Option(min=1, help="Engine slots.")] = EngineSettings.model_fields[
        "max_active_adapters"
    ].default,
    max_resident_adapters: Annotated[
        int, typer.Option(min=1, help="Adapters that an engine keeps in host memory.")
    ] = EngineSettings.model_fields["max_resident_adapters"].default,
    cold_ms: Annotated[float, typer.Option(min=0, help="Store to host memory.")] = COLD_MS,
    activate_ms: Annotated[float, typer.Option(min=0, help="Host memory to slot.")] = 0,
    goal_ms: Annotated[float, typer.Option(min=1, help="What 99 of 100 may wait, besides loading.")] = 500,
    model: Annotated[str | None, typer.Option(help="As of `size`: places and --host-gib follow from it.")] = None,
    gpu: Annotated[str, typer.Option(help=f"GiB of one GPU, or one of: {', '.join(GPUS)}.")] = "l4",
    stored: Annotated[str, typer.Option(help=f"Weights as one of: {', '.join(STORED)}.")] = "bfloat16",
    context: Annotated[int, typer.Option(min=1, help="With --model: tokens of a mean request in the cache.")] = 2048,
    max_lora_rank: Annotated[int, typer.Option(min=1, max=512, help="With --model.")] = 16,
    host_gib: Annotated[float | None, typer.Option(min=0.1, help="With --model: host memory for adapters.")] = None,
    gpus_per_replica: Annotated[int, typer.Option(min=1)] = 1,
    gpu_hour: Annotated[float, typer.Option(min=0, help="Price of a GPU for an hour.")] = 1.0,
    requests: Annotated[int, typer.Option(min=100, max=1_000_000, help="To simulate, at least.")] = 20_000,
    seed: Annotated[int, typer.Option(help="The same seed gives the same answer.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")] = False,
) -> None:
    """Say which adapters to merge into deployments of their own and which to serve together, by what it takes in GPUs.

    Traffic is a log's, or made up. The pool is simulated; merged deployments are computed by Erlang's formula.
    """
    with told_errors():
        slots, resident = max_active_adapters, max(max_resident_adapters, max_active_adapters + 1)
        if model:
            places, resident = _sized(
                model, Wish(memory_of(gpu), _known(stored), max_lora_rank, slots, context, gpus=gpus_per_replica),
                host_gib, resident,
            )  # fmt: skip
        turn_s, waiting = (
            GatewaySettings.model_fields[it].default for it in ("adapter_turn_s", "max_waiting_requests")
        )
        pool = Pool(1, places, slots, resident, cold_ms / 1000, activate_ms / 1000, turn_s, waiting)
        costs = Costs(pool, adapter_overhead, goal_ms / 1000, gpus_per_replica, gpu_hour, requests, seed)
        traffic = (
            read_log(log, token_ms / 1000, sample, window_minutes * 60)
            if log
            else zipf(adapters, rate, exponent, tokens, token_ms / 1000)
        )
        advice = advise(traffic, costs)
    if as_json:
        print_json(_document(traffic, costs, advice))
    else:
        _show(traffic, costs, advice)


def _known(stored: str) -> str:
    if stored not in STORED:
        raise TrafficLogInvalid(f"Weights can't be stored as {stored!r}. Give --stored one of: {', '.join(STORED)}.")
    return stored


def _sized(model: str, wish: Wish, host_gib: float | None, resident: int) -> tuple[int, int]:
    """Requests and adapters that fit. Raises StateInvalid or TrafficLogInvalid."""
    shape = shape_of(model)
    places = min(_MOST_PLACES, int(fit(shape, wish).sequences))
    if places < 1:
        raise TrafficLogInvalid(
            f"{model} as {wish.stored} leaves no room for one request of {wish.context} tokens: see "
            f"`python -m serve size {model}`."
        )
    if host_gib:
        resident = max(wish.slots + 1, int(host_gib * (1 << 30)) // adapter_bytes(shape, wish.max_rank))
    return places, resident


def _document(traffic: Sequence[Asked], costs: Costs, advice: Advice) -> dict[str, Any]:
    plans = {name: asdict(getattr(advice, name)) for name in _PLANS}
    for it in plans.values():
        it["merged"] = len(it.pop("alone"))
    return {
        "requests_per_s": sum(it.rate for it in traffic),
        "models": len(traffic),
        "pool": {name: value for name, value in asdict(costs.pool).items() if name != "replicas"},
        "plans": plans,
        "merge": [asdict(it) for it in advice.best.alone],
        "keep_together": [it.name for it in _rest(traffic, advice.best)],
    }


def _show(traffic: Sequence[Asked], costs: Costs, advice: Advice) -> None:
    columns = ("plan", "merged", "GPUs", "per 1M tokens", "in slot", "in memory", "cold", "wait p50", "wait p99")
    shown = Table(*columns, title=f"{len(traffic)} models, {sum(it.rate for it in traffic):.4g} requests/s")
    for name, title in _PLANS.items():
        shown.add_row(title, *_cells(getattr(advice, name)))
    Console().print(shown)
    if advice.best.alone:
        _show_alone(advice.best.alone)
    else:
        busiest = max((alone(it, costs) for it in traffic), key=lambda it: it.pool_share)
        err.print(
            f"Keep all together: the busiest, {busiest.name}, would fill {busiest.filled:.0%} of the "
            f"{busiest.replicas} replica(s) of its own.",
            markup=False, highlight=False,
        )  # fmt: skip
    if advice.best.pool and slots_bound(rest := _rest(traffic, advice.best), costs, advice.best.pool_replicas):
        err.print(
            f"The pool of {len(rest)} is bound by its {costs.pool.slots} slots, not by its {costs.pool.places} places: "
            "try more --max-active-adapters.",
            highlight=False,
        )
    if not advice.together.meets_goal:
        err.print("Together, no number of replicas meets --goal-ms: more slots or host memory may (docs/tiers.md).")


def _rest(traffic: Sequence[Asked], plan: Plan) -> list[Asked]:
    merged = set(plan.merged)
    return [it for it in traffic if it.name not in merged]


def _show_alone(merged: Sequence[Alone]) -> None:
    table = Table("merge", "replicas", "filled", "replicas' worth in the pool")
    for it in merged[:_SHOWN]:
        table.add_row(it.name, str(it.replicas), f"{it.filled:.0%}", f"{it.pool_share:.2f}")
    Console().print(table)
    if len(merged) > _SHOWN:
        err.print(f"… {len(merged) - _SHOWN} more: see --json")


def _cells(plan: Plan) -> tuple[str, ...]:
    known = (str(len(plan.alone)), str(plan.gpus), f"{plan.per_million_tokens:.3g}")
    if plan.pool is None:
        return (*known, "-", "-", "-", "-", "-")
    shares = (f"{it:.1%}" for it in (plan.pool.in_slot, plan.pool.in_memory, plan.pool.cold))
    waits = (f"{it * 1000:.0f} ms" for it in (plan.pool.wait_p50_s, plan.pool.wait_p99_s))
    return (*known, *shares, *waits)
