"""What the gateway costs: Graft beside vLLM's own API server, each alone on the machine, under the same load.

`python -m benchmarks.gateway` serves one adapter of a tiny model, so that much of the time is the front end's; `--case
merged` the model that it is merged into, where both engines run the same code; `--case real` a merged and quantized
fine-tune of SmolLM2-135M, where the engine has most of the work. It takes turns: vLLM, Graft, Graft, vLLM, … Each
visit starts the server, runs every load of `benchmarks.gateway_side` and stops it. Ratios are between visits of the
same turn. Processor time outside the engine is the steadiest figure: it counts every process of a server but the
engine core, Ray's and HAProxy included.

Visits that lie in `--work` already are taken as they are, so that an interrupted run goes on where it stopped.
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
from benchmarks.gateway_load import Cell
from benchmarks.gateway_picture import draw
from benchmarks.gateway_side import CONCURRENCY, Run, read_runs
from benchmarks.record import RESULTS, Figure, write_result
from benchmarks.servers import SIDES
from benchmarks.turns import in_turns
from examples.demo import ARTIFACTS, convert_all, make_checkpoints

# What is served, and the name of its result.
CASES = {"adapter": "gateway", "merged": "gateway_merged", "real": "gateway_real"}
CELLS = [Cell(concurrency, streams) for streams in (True, False) for concurrency in CONCURRENCY]
# Enough callers that what Ray does by itself counts little, few enough that nobody queues for the machine.
CPU_CELL = Cell(32, streams=True)
# Cores; with more of them somebody else's, two visits of one turn meet different machines.
MAX_OTHERS = 0.2

Visits = Mapping[str, Sequence[Sequence[Run]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short visit each, to try it; writes no result")
    parser.add_argument("--case", choices=CASES, default="adapter", help="what is served (default adapter)")
    parser.add_argument("--turns", type=int, default=3, help="visits of each server (default 3)")
    parser.add_argument("--seconds", type=float, default=5, help="about how long one load runs (default 5)")
    parser.add_argument("--work", type=Path, help="keep the visits here and take those that are here already")
    options = parser.parse_args()
    turns, seconds = (1, 1.0) if options.quick else (options.turns, options.seconds)
    with tempfile.TemporaryDirectory() as directory:
        work = options.work or Path(directory)
        work.mkdir(parents=True, exist_ok=True)
        visits = take_turns(work, artifact_of(options.case, work), turns, seconds)
    found = figures(visits)
    if found["other_processes"].value > MAX_OTHERS:
        print("Other processes kept this machine busy: throughput and latency say little, measure again.", flush=True)
    if options.quick:
        for name, figure in found.items():
            print(f"{name:48} {figure.value:.4g} {figure.unit}")
        return
    name = CASES[options.case]
    write_result(name, found, "make bench-gateway")
    draw(visits, RESULTS / f"{name}.png")


def artifact_of(case: str, work: Path) -> Path:
    if case == "real":
        make_checkpoints()
        convert_all()
        return ARTIFACTS / "ticket"
    artifact = work / "artifact"
    if not artifact.exists():
        adapters.plain(work / "made", artifact, "merge" if case == "merged" else "adapter")
    return artifact


def take_turns(work: Path, artifact: Path, turns: int, seconds: float) -> Visits:
    """Every side `turns` times, each time in the other order."""
    visits: dict[str, list[list[Run]]] = {side: [] for side in SIDES}
    for number, side in in_turns(SIDES, turns):
        visits[side].append(visit(side, artifact, work / f"{side}-{number}.json", seconds))
    return visits


def visit(side: str, artifact: Path, out: Path, seconds: float) -> list[Run]:
    if not out.exists():
        print(f"visiting {side} …", flush=True)
        command = [sys.executable, "-m", "benchmarks.gateway_side", side, artifact, out, "--seconds", str(seconds)]
        subprocess.run(list(map(str, command)), check=True)
    return read_runs(out)


def figures(visits: Visits) -> dict[str, Figure]:
    bare, graft = visits["bare"], visits["graft"]
    throughput = {cell: paired(bare, graft, cell, lambda it: it.told.requests_per_s, ratio) for cell in CELLS}
    cpu = {cell: paired(bare, graft, cell, lambda it: it.front_end_ms, ratio) for cell in CELLS}
    worst = min(CELLS, key=lambda cell: statistics.median(throughput[cell]))
    alone = Cell(1, streams=True)
    added = paired(bare, graft, alone, lambda it: it.told.ttft_p50_ms, difference)
    found = {
        "worst_throughput_ratio": Figure.of(throughput[worst], f"Graft / vLLM, at {worst.name}", ">= 0.97"),
        "added_ttft_p50_ms_c1": Figure.of(added, "ms", "<= 2"),
        "cpu_per_streamed_request_ratio": Figure.of(cpu[CPU_CELL], f"Graft / vLLM, at {CPU_CELL.name}", "<= 1.5"),
    }
    found |= {f"throughput_ratio_{cell.name}": Figure.of(throughput[cell], "Graft / vLLM") for cell in CELLS}
    found |= {f"cpu_ratio_{cell.name}": Figure.of(cpu[cell], "Graft / vLLM") for cell in CELLS}
    for side, of_side in visits.items():
        for cell in CELLS:
            found |= figures_of(f"{side}_{cell.name}", runs_of(of_side, cell))
    found["other_processes"] = Figure.of(
        [run.others for of_side in visits.values() for runs in of_side for run in runs], "cores"
    )
    return found


def figures_of(name: str, runs: Sequence[Run]) -> dict[str, Figure]:
    kinds = sorted({kind for run in runs for kind in run.cpu_s})
    found = {
        f"{name}_requests_per_s": Figure.of([it.told.requests_per_s for it in runs], "requests/s"),
        f"{name}_ttft_p50_ms": Figure.of([it.told.ttft_p50_ms for it in runs], "ms"),
        f"{name}_ttft_p99_ms": Figure.of([it.told.ttft_p99_ms for it in runs], "ms"),
        f"{name}_itl_p50_ms": Figure.of([it.told.itl_p50_ms for it in runs], "ms"),
        f"{name}_itl_p99_ms": Figure.of([it.told.itl_p99_ms for it in runs], "ms"),
        f"{name}_front_end_cpu_ms": Figure.of([it.front_end_ms for it in runs], "CPU-ms / request"),
    }
    for kind in kinds:
        found[f"{name}_{kind}_cpu_ms"] = Figure.of([it.cpu_ms(kind) for it in runs], "CPU-ms / request")
    return found


def runs_of(visits: Sequence[Sequence[Run]], cell: Cell) -> list[Run]:
    return [run for runs in visits for run in runs if run.cell == cell]


def paired(
    bare: Sequence[Sequence[Run]],
    graft: Sequence[Sequence[Run]],
    cell: Cell,
    measure: Callable[[Run], float],
    compare: Callable[[float, float], float],
) -> list[float]:
    """What comes of comparing Graft's run with vLLM's, for every turn."""
    both = zip(runs_of(bare, cell), runs_of(graft, cell), strict=True)
    return [compare(measure(theirs), measure(ours)) for theirs, ours in both]


def ratio(theirs: float, ours: float) -> float:
    return ours / theirs


def difference(theirs: float, ours: float) -> float:
    return ours - theirs


if __name__ == "__main__":
    main()
