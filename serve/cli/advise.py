"""`python -m serve advise`: merge an adapter, or keep it with the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer
from pydantic import BaseModel, ConfigDict, Field
from rich.table import Table

from serve.capacity import advice as capacity
from serve.capacity.advice import Advice, Costs, DedicatedPlan, DeploymentPlan
from serve.capacity.simulate import ReplicaPool
from serve.capacity.size import STORED, SizingRequest, adapter_bytes, fit
from serve.capacity.traffic import ModelTraffic, read_log, zipf
from serve.cli.command import expand_options, setting
from serve.cli.console import counted, err, new_table, print_json, print_table, reported_errors
from serve.cli.options import AsJson
from serve.cli.size import GPUS, memory_of, shape_of
from serve.errors import TrafficLogInvalid
from serve.settings import EngineSettings, GatewaySettings

# Measured: `cold_minus_warm_ms` of benchmarks/results/swap.json, an adapter of a model of 135 M parameters on a disk.
COLD_MS = 20.0
_MOST_ADAPTERS = 100_000
_MOST_PLACES = 256  # vLLM's --max-num-seqs
_SHOWN = 20
_FIGURES = ("merged", "GPUs", "per 1M tokens", "in slot", "in memory", "cold", "wait p50", "wait p99")
_PLANS = {"together": "all together", "apart": "one merged deployment each", "best": "advised"}


class AdviseOptions(BaseModel):
    """The options of `advise`."""

    model_config = ConfigDict(frozen=True)

    log: Path | None = Field(None, description="Access log, or JSON lines of time, model, tokens.")
    sample: float = Field(1.0, ge=1e-6, le=1, description="Share of requests that the log holds.")
    window_minutes: float = Field(60, ge=0.1, description="Length of the busiest part of the log, which decides.")
    adapters: int = Field(100, ge=1, le=_MOST_ADAPTERS, description="Without --log: number of adapters.")
    rate: float = Field(20, ge=1e-6, description="Without --log: requests a second, all adapters together.")
    exponent: float = Field(
        1.0, ge=0, le=5, description="Without --log: exponent of Zipf's law; 0: all adapters get the same."
    )
    tokens: float = Field(200, ge=1, description="Without --log: tokens of a mean answer.")
    token_ms: float = Field(25, ge=0.001, description="One token of one request, in a full batch.")
    adapter_overhead: float = Field(1.2, ge=1, description="Time of a token with adapters ÷ of a merged model.")
    places: int = Field(64, ge=1, description="Requests that an engine works on at a time.")
    max_active_adapters: int = setting(EngineSettings, "max_active_adapters")
    max_resident_adapters: int = setting(EngineSettings, "max_resident_adapters")
    cold_ms: float = Field(COLD_MS, ge=0, description="Time to load an adapter from the store into host memory.")
    activate_ms: float = Field(0, ge=0, description="Time to load an adapter from host memory into a slot.")
    goal_ms: float = Field(500, ge=1, description="What 99 of 100 requests may wait, without the time of loading.")
    model: str | None = Field(None, description="A model as `size` takes it: --places follows from it.")
    gpu: str = Field("l4", description=f"GiB of one GPU, or one of: {', '.join(GPUS)}.")
    stored: str = Field("bfloat16", description=f"Weights as one of: {', '.join(STORED)}.")
    context: int = Field(2048, ge=1, description="With --model: tokens of a mean request in the cache.")
    max_lora_rank: int = Field(16, ge=1, le=512, description="With --model: largest adapter rank.")
    host_gib: float | None = Field(None, ge=0.1, description="With --model: host memory for adapters.")
    gpus_per_replica: int = Field(1, ge=1)
    gpu_hour: float = Field(1.0, ge=0, description="Price of a GPU for an hour.")
    requests: int = Field(20_000, ge=100, le=1_000_000, description="Requests to simulate, at least.")
    seed: int = Field(0, description="The same seed gives the same answer.")
    as_json: AsJson = False

    def costs(self) -> Costs:
        """The costs to assume. Raises StateInvalid or TrafficLogInvalid if --model is unknown or does not fit."""
        places, resident = self._capacity()
        gateway = GatewaySettings.model_fields
        turn_s, waiting = gateway["adapter_turn_s"].default, gateway["max_waiting_requests"].default
        pool = ReplicaPool(
            1, places, self.max_active_adapters, resident, self.cold_ms / 1000, self.activate_ms / 1000, turn_s, waiting
        )
        return Costs(
            pool, self.adapter_overhead, self.goal_ms / 1000, self.gpus_per_replica, self.gpu_hour, self.requests,
            self.seed,
        )  # fmt: skip

    def traffic(self) -> Sequence[ModelTraffic]:
        """The traffic of the log, or by Zipf's law. Raises TrafficLogInvalid."""
        token_s = self.token_ms / 1000
        if self.log:
            return read_log(self.log, token_s, self.sample, self.window_minutes * 60)
        return zipf(self.adapters, self.rate, self.exponent, self.tokens, token_s)

    def _capacity(self) -> tuple[int, int]:
        """Requests and adapters that one engine holds at a time."""
        slots = self.max_active_adapters
        resident = max(self.max_resident_adapters, slots + 1)
        if not self.model:
            return self.places, resident
        if self.stored not in STORED:
            expected = ", ".join(STORED)
            raise TrafficLogInvalid(f"Weights can't be stored as {self.stored!r}. Give --stored one of: {expected}.")
        shape = shape_of(self.model)
        request = SizingRequest(
            memory_of(self.gpu), self.stored, self.max_lora_rank, slots, self.context, gpus=self.gpus_per_replica
        )
        places = min(_MOST_PLACES, int(fit(shape, request).sequences))
        if places < 1:
            raise TrafficLogInvalid(
                f"{self.model} as {self.stored} leaves no room for one request of {self.context} tokens: see "
                f"`python -m serve size {self.model}`."
            )
        if self.host_gib:
            resident = max(slots + 1, int(self.host_gib * (1 << 30)) // adapter_bytes(shape, self.max_lora_rank))
        return places, resident


def add_to(app: typer.Typer) -> None:
    """Make `advise` a command of `app`."""
    app.command()(advise)


@expand_options
def advise(options: AdviseOptions) -> None:
    """Advise which adapters to merge into deployments of their own and which to serve together, by the GPUs they need.

    The traffic comes from a log, or from Zipf's law. The pool is simulated; merged deployments are computed by Erlang's
    formula.
    """
    with reported_errors():
        costs, traffic = options.costs(), options.traffic()
        advice = capacity.advise(traffic, costs)
    if options.as_json:
        print_json(_document(traffic, costs, advice))
    else:
        _show(traffic, costs, advice)


def _document(traffic: Sequence[ModelTraffic], costs: Costs, advice: Advice) -> dict[str, Any]:
    plans = {name: asdict(getattr(advice, name)) for name in _PLANS}
    for plan in plans.values():
        plan["merged"] = len(plan.pop("dedicated"))
    return {
        "requests_per_s": sum(model.rate for model in traffic),
        "models": len(traffic),
        "pool": {name: value for name, value in asdict(costs.pool).items() if name != "replicas"},
        "plans": plans,
        "merge": [asdict(dedicated) for dedicated in advice.best.dedicated],
        "keep_together": [model.name for model in _pooled(traffic, advice.best)],
    }


def _show(traffic: Sequence[ModelTraffic], costs: Costs, advice: Advice) -> None:
    requests_per_s = sum(model.rate for model in traffic)
    print_table(_plans(advice), f"{counted(len(traffic), 'model')}, {requests_per_s:.4g} requests/s")
    if advice.best.dedicated:
        _show_dedicated(advice.best.dedicated)
    else:
        dedicated = (capacity.plan_dedicated(model, costs) for model in traffic)
        busiest = max(dedicated, key=lambda plan: plan.pool_share)
        err.print(
            f"Keep all together: the busiest, {busiest.name}, would fill {busiest.filled:.0%} of "
            f"{counted(busiest.replicas, 'replica')} of its own.",
            markup=False, highlight=False,
        )  # fmt: skip
    pooled = _pooled(traffic, advice.best)
    if advice.best.pool and capacity.is_bound_by_slots(pooled, costs, advice.best.pool_replicas):
        err.print(
            f"The pool of {len(pooled)} is bound by its {costs.pool.slots} slots, not by its {costs.pool.places} "
            "places: try more --max-active-adapters.",
            highlight=False,
        )
    if not advice.together.meets_goal:
        err.print(
            "Together, no number of replicas meets --goal-ms: more slots or host memory may "
            "(docs/explanation/adapter-tiers.md)."
        )


def _plans(advice: Advice) -> Table:
    """A column for each plan: their names are longer than the figures."""
    table = new_table("", *_PLANS.values())
    figures = zip(*(_figures(getattr(advice, name)) for name in _PLANS), strict=True)
    for name, row in zip(_FIGURES, figures, strict=True):
        table.add_row(name, *row)
    return table


def _pooled(traffic: Sequence[ModelTraffic], plan: DeploymentPlan) -> list[ModelTraffic]:
    merged = set(plan.merged)
    return [model for model in traffic if model.name not in merged]


def _show_dedicated(merged: Sequence[DedicatedPlan]) -> None:
    table = new_table("merge", "replicas", "filled", "replicas' worth in the pool")
    for dedicated in merged[:_SHOWN]:
        share = f"{dedicated.pool_share:.2f}"
        table.add_row(dedicated.name, str(dedicated.replicas), f"{dedicated.filled:.0%}", share)
    print_table(table)
    if len(merged) > _SHOWN:
        err.print(f"… {len(merged) - _SHOWN} more: see --json")


def _figures(plan: DeploymentPlan) -> tuple[str, ...]:
    known = (str(len(plan.dedicated)), str(plan.gpus), f"{plan.per_million_tokens:.3g}")
    if plan.pool is None:
        return (*known, "-", "-", "-", "-", "-")
    shares = (f"{share:.1%}" for share in (plan.pool.in_slot, plan.pool.in_memory, plan.pool.cold))
    waits = (f"{wait_s * 1000:.0f} ms" for wait_s in (plan.pool.wait_p50_s, plan.pool.wait_p99_s))
    return (*known, *shares, *waits)
