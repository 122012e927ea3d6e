"""The overhead of the gateway: Graft and vLLM's own API server, each alone on the machine, under the same load.

`python -m benchmarks.gateway` serves one adapter of a tiny model, so that the front end takes much of the time. `--case
merged` serves the merged model, where both engines run the same code. `--case real` serves a merged and quantized
fine-tune of SmolLM2-135M, where the engine has most of the work. The sides alternate: vLLM, Graft, Graft, vLLM, … Each
visit starts the server, runs every load of `benchmarks.gateway_side` and stops the server. Ratios are between visits of
the same turn. Processor time outside the engine varies least: it counts every process of a server except the engine
core, also those of Ray and HAProxy.

Results of visits that are already in `--work` are used as they are, so that an interrupted run can continue.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks import adapters
from benchmarks.alternation import alternating
from benchmarks.gateway_load import Workload
from benchmarks.gateway_picture import draw
from benchmarks.gateway_side import CONCURRENCY, Run, read_runs
from benchmarks.progress import step
from benchmarks.record import RESULTS, Figure, print_figures, write_result
from benchmarks.servers import SIDES
from examples.demo import ARTIFACTS, convert_all, make_checkpoints

# What is served, and the name of the result.
CASES = {"adapter": "gateway", "merged": "gateway_merged", "real": "gateway_real"}
WORKLOADS = [Workload(concurrency, streams) for streams in (True, False) for concurrency in CONCURRENCY]
# Enough callers that the idle work of Ray counts little, few enough that they don't queue for the machine.
CPU_WORKLOAD = Workload(32, streams=True)
# With more cores used by other processes, the two visits of one turn are not comparable.
MAX_OTHER_CORES = 0.2

Visits = Mapping[str, Sequence[Sequence[Run]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short visit of each server; writes no result")
    parser.add_argument("--case", choices=CASES, default="adapter", help="what is served (default adapter)")
    parser.add_argument("--turns", type=int, default=3, help="visits of each server (default 3)")
    parser.add_argument("--seconds", type=float, default=5, help="about how long one load runs (default 5)")
    parser.add_argument("--work", type=Path, help="directory for the results of visits; those already in it are used")
    options = parser.parse_args()
    turns, seconds = (1, 1.0) if options.quick else (options.turns, options.seconds)
    with tempfile.TemporaryDirectory() as directory:
        work = options.work or Path(directory)
        work.mkdir(parents=True, exist_ok=True)
        visits = take_turns(work, artifact_of(options.case, work), turns, seconds)
    measured = figures(visits)
    if measured["other_processes"].value > MAX_OTHER_CORES:
        step("Other processes kept this machine busy: throughput and latency say little, measure again.")
    if options.quick:
        print_figures(measured)
        return
    name = CASES[options.case]
    write_result(name, measured, "make bench-gateway")
    draw(visits, RESULTS / f"{name}.png")


def artifact_of(case: str, work: Path) -> Path:
    if case == "real":
        make_checkpoints()
        convert_all()
        return ARTIFACTS / "ticket"
    artifact = work / "artifact"
    if not artifact.exists():
        adapters.build_lora_artifact(work / "made", artifact, "merge" if case == "merged" else "adapter")
    return artifact


def take_turns(work: Path, artifact: Path, turns: int, seconds: float) -> Visits:
    """Visit every side `turns` times, in alternating order."""
    visits: dict[str, list[list[Run]]] = {side: [] for side in SIDES}
    for number, side in alternating(SIDES, turns):
        step(f"turn {number + 1} of {turns}: {side}")
        visits[side].append(visit(side, artifact, work / f"{side}-{number}.json", seconds))
    return visits


def visit(side: str, artifact: Path, out: Path, seconds: float) -> list[Run]:
    if not out.exists():
        command = [sys.executable, "-m", "benchmarks.gateway_side", side, artifact, out, "--seconds", str(seconds)]
        subprocess.run(list(map(str, command)), check=True)
    return read_runs(out)


def figures(visits: Visits) -> dict[str, Figure]:
    bare, graft = visits["bare"], visits["graft"]
    throughput = {
        workload: paired(bare, graft, workload, lambda run: run.load.requests_per_s, ratio) for workload in WORKLOADS
    }
    cpu = {workload: paired(bare, graft, workload, lambda run: run.front_end_ms, ratio) for workload in WORKLOADS}
    worst = min(WORKLOADS, key=lambda workload: statistics.median(throughput[workload]))
    single_stream = Workload(1, streams=True)
    added = paired(bare, graft, single_stream, lambda run: run.load.ttft_p50_ms, difference)
    by_key = {
        "worst_throughput_ratio": Figure.of(throughput[worst], f"Graft / vLLM, at {worst.name}", ">= 0.97"),
        "added_ttft_p50_ms_c1": Figure.of(added, "ms", "<= 2"),
        "cpu_per_streamed_request_ratio": Figure.of(
            cpu[CPU_WORKLOAD], f"Graft / vLLM, at {CPU_WORKLOAD.name}", "<= 1.5"
        ),
    }
    by_key |= {
        f"throughput_ratio_{workload.name}": Figure.of(throughput[workload], "Graft / vLLM") for workload in WORKLOADS
    }
    by_key |= {f"cpu_ratio_{workload.name}": Figure.of(cpu[workload], "Graft / vLLM") for workload in WORKLOADS}
    for side, visits_of_side in visits.items():
        for workload in WORKLOADS:
            by_key |= figures_of(f"{side}_{workload.name}", runs_of(visits_of_side, workload))
    by_key["other_processes"] = Figure.of(
        [run.other_cores for visits_of_side in visits.values() for runs in visits_of_side for run in runs], "cores"
    )
    return by_key


def figures_of(name: str, runs: Sequence[Run]) -> dict[str, Figure]:
    kinds = sorted({kind for run in runs for kind in run.cpu_s})
    by_key = {
        f"{name}_requests_per_s": Figure.of([run.load.requests_per_s for run in runs], "requests/s"),
        f"{name}_ttft_p50_ms": Figure.of([run.load.ttft_p50_ms for run in runs], "ms"),
        f"{name}_ttft_p99_ms": Figure.of([run.load.ttft_p99_ms for run in runs], "ms"),
        f"{name}_itl_p50_ms": Figure.of([run.load.itl_p50_ms for run in runs], "ms"),
        f"{name}_itl_p99_ms": Figure.of([run.load.itl_p99_ms for run in runs], "ms"),
        f"{name}_front_end_cpu_ms": Figure.of([run.front_end_ms for run in runs], "CPU-ms / request"),
    }
    for kind in kinds:
        by_key[f"{name}_{kind}_cpu_ms"] = Figure.of([run.cpu_ms(kind) for run in runs], "CPU-ms / request")
    return by_key


def runs_of(visits: Sequence[Sequence[Run]], workload: Workload) -> list[Run]:
    return [run for runs in visits for run in runs if run.workload == workload]


def paired(
    bare: Sequence[Sequence[Run]],
    graft: Sequence[Sequence[Run]],
    workload: Workload,
    measure: Callable[[Run], float],
    compare: Callable[[float, float], float],
) -> list[float]:
    """`compare` of vLLM's measure and Graft's measure, for every turn."""
    run_pairs = zip(runs_of(bare, workload), runs_of(graft, workload), strict=True)
    return [compare(measure(bare_value), measure(graft_value)) for bare_value, graft_value in run_pairs]


def ratio(bare_value: float, graft_value: float) -> float:
    return graft_value / bare_value


def difference(bare_value: float, graft_value: float) -> float:
    return graft_value - bare_value


if __name__ == "__main__":
    main()
