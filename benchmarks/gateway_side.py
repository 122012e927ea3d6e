"""One visit of `benchmarks.gateway` to one server.

`python -m benchmarks.gateway_side SIDE ARTIFACT OUT` starts the server, runs every load and writes the results, with
the processor time of each kind of process.

The engine is a process of its own on both sides, vLLM's engine core. All other processes are the front end.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from benchmarks import gateway_load
from benchmarks.gateway_load import LoadResult, Workload
from benchmarks.process_usage import busy_seconds
from benchmarks.progress import step
from benchmarks.servers import ENGINE_THREADS, NO_CAPACITY, AdapterCapacity, bare, graft
from convert.artifact import Artifact

CAPACITY = AdapterCapacity(slots=2, resident=4)
ADAPTER, BASE = "french", "base"
CONCURRENCY = (1, 8, 32, 128)
SEED = 7

# A part of the command line, and the kind of process; the first match counts.
_KINDS = (
    ("EngineCore", "engine"),
    ("haproxy", "haproxy"),
    ("ray::ServeReplica", "replica"),
    ("vllm.entrypoints.openai.api_server", "api_server"),
)


@dataclass(frozen=True)
class Run:
    """One load: the result of the generator, and seconds of processor time by kind of process meanwhile."""

    workload: Workload
    load: LoadResult
    cpu_s: dict[str, float]
    duration_s: float
    other_cores: float  # that neither the server nor the generator used

    @property
    def front_end_ms(self) -> float:
        """Milliseconds of processor time outside the engine for each request."""
        return sum(self.cpu_ms(kind) for kind in self.cpu_s if kind != "engine")

    def cpu_ms(self, kind: str) -> float:
        """Milliseconds of processor time of one kind of process for each request."""
        return 1000 * self.cpu_s.get(kind, 0.0) / self.load.requests


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("artifact", type=Path, help="a base with its adapter, or a merged model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=8, help="about how long one load runs")
    options = parser.parse_args()
    os.environ.update(ENGINE_THREADS)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ends the contexts, which stop the server
    with tempfile.TemporaryDirectory() as directory, SIDES[options.side](options.artifact, Path(directory)) as url:
        runs = visit(url, options.artifact, options.rounds, options.seconds)
    options.out.write_text(json.dumps([asdict(run) for run in runs], indent=1) + "\n")


def read_runs(path: Path) -> list[Run]:
    """Read the file that a visit wrote."""
    return [
        Run(**document | {"workload": Workload(**document["workload"]), "load": LoadResult(**document["load"])})
        for document in json.loads(path.read_text())
    ]


def visit(url: str, artifact: Path, rounds: int, seconds: float) -> list[Run]:
    """Run every load `rounds` times, in alternating order, so that drift of the machine affects all loads."""
    model = ADAPTER if has_adapter(artifact) else BASE
    workloads = [Workload(concurrency, streams) for concurrency in CONCURRENCY for streams in (True, False)]
    counts = {concurrency: requests_for(url, model, artifact, concurrency, seconds) for concurrency in CONCURRENCY}
    runs = []
    for number in range(rounds):
        for workload in workloads if number % 2 else reversed(workloads):
            runs.append(measure_load(url, model, artifact, workload, counts[workload.concurrency], SEED + number))
            run = runs[-1]
            step(
                f"{workload.name:12} {run.load.requests_per_s:7.1f} requests/s,"
                f" first token {run.load.ttft_p50_ms:6.1f} ms, front end {run.front_end_ms:5.2f} ms a request,"
                f" others {run.other_cores:.2f} cores"
                f" { ({kind: round(run.cpu_ms(kind), 2) for kind in run.cpu_s}) }"
            )
    return runs


def has_adapter(artifact: Path) -> bool:
    return Artifact.open(artifact).adapter_path is not None


def requests_for(url: str, model: str, artifact: Path, concurrency: int, seconds: float) -> int:
    """The number of streamed requests that take about `seconds`. Measuring it also warms up the server."""
    workload = Workload(concurrency, True)
    load = gateway_load.generate(url, model, artifact / "model", workload, 2 * concurrency + 8, seed=1)
    return max(2 * concurrency, 20, round(seconds * load.requests_per_s))


def measure_load(url: str, model: str, artifact: Path, workload: Workload, requests: int, seed: int) -> Run:
    began, before, all_before, own = time.monotonic(), cpu_seconds(), busy_seconds(), time.process_time()
    load = gateway_load.generate(url, model, artifact / "model", workload, requests, seed)
    duration_s, after = time.monotonic() - began, cpu_seconds()
    used: dict[str, float] = {}
    for process, (kind, seconds) in after.items():
        used[kind] = used.get(kind, 0) + seconds - before.get(process, ("", 0.0))[1]
    other_s = busy_seconds() - all_before - sum(used.values()) - (time.process_time() - own)
    return Run(workload, load, used, duration_s, max(0.0, other_s / duration_s))


def cpu_seconds() -> dict[psutil.Process, tuple[str, float]]:
    """The kind and the processor time of every descendant of this process."""
    usage = {}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            usage[process] = (kind_of(process), times.user + times.system)
    return usage


def kind_of(process: psutil.Process) -> str:
    words = f"{process.name()} {' '.join(process.cmdline())}"
    return next((kind for part, kind in _KINDS if part in words), "rest")


@contextlib.contextmanager
def graft_side(artifact: Path, home: Path) -> Iterator[str]:
    with graft([artifact], home, 1, CAPACITY if has_adapter(artifact) else NO_CAPACITY) as server:
        yield server.url


@contextlib.contextmanager
def bare_side(artifact: Path, home: Path) -> Iterator[str]:
    adapter = Artifact.open(artifact).adapter_path
    loaded, capacity = ({ADAPTER: adapter}, CAPACITY) if adapter else ({}, NO_CAPACITY)
    with bare(artifact / "model", home, 1, capacity, loaded) as (url,):
        yield url


SIDES: dict[str, Callable[[Path, Path], AbstractContextManager[str]]] = {"graft": graft_side, "bare": bare_side}

if __name__ == "__main__":
    main()
