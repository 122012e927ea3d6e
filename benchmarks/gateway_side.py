"""One visit of `benchmarks.gateway` to one server: `python -m benchmarks.gateway_side SIDE MODEL OUT` starts it alone,
runs every load and writes what was found, with the processor time of each kind of process.

What is the engine's is known by its process: vLLM keeps the engine core in one of its own on both sides, and what is
left is what a front end costs.
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
from benchmarks.gateway_load import Cell, Told
from benchmarks.servers import ENGINE_THREADS, NO_ADAPTERS, Room, bare, graft
from convert.artifact import Artifact

ROOM = Room(slots=2, resident=4)
ADAPTER, BASE = "french", "base"
CONCURRENCY = (1, 8, 32, 128)
SEED = 7

# Found in a process's command line, the first that fits.
_KINDS = (
    ("EngineCore", "engine"),
    ("haproxy", "haproxy"),
    ("ray::ServeReplica", "replica"),
    ("vllm.entrypoints.openai.api_server", "api_server"),
)


@dataclass(frozen=True)
class Run:
    """One load: what callers saw, and seconds of processor time by kind of process while it ran."""

    cell: Cell
    told: Told
    cpu_s: dict[str, float]
    took_s: float
    others: float  # cores that processes which are neither the server nor the generator kept busy

    @property
    def front_end_ms(self) -> float:
        """Milliseconds of processor time a request outside the engine."""
        return sum(self.cpu_ms(kind) for kind in self.cpu_s if kind != "engine")

    def cpu_ms(self, kind: str) -> float:
        """Milliseconds of processor time a request of one kind of process."""
        return 1000 * self.cpu_s.get(kind, 0.0) / self.told.requests


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("artifact", type=Path, help="of a base and its adapter, or of a merged model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=8, help="about how long one load runs")
    options = parser.parse_args()
    os.environ.update(ENGINE_THREADS)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the server is stopped then too
    with tempfile.TemporaryDirectory() as directory, SIDES[options.side](options.artifact, Path(directory)) as url:
        runs = visit(url, options.artifact, options.rounds, options.seconds)
    options.out.write_text(json.dumps([asdict(run) for run in runs], indent=1) + "\n")


def read_runs(path: Path) -> list[Run]:
    """What a visit wrote."""
    return [
        Run(**document | {"cell": Cell(**document["cell"]), "told": Told(**document["told"])})
        for document in json.loads(path.read_text())
    ]


def visit(url: str, artifact: Path, rounds: int, seconds: float) -> list[Run]:
    """Every load `rounds` times, from the most callers to one and back, so that drift meets all of them."""
    model = ADAPTER if has_adapter(artifact) else BASE
    cells = [Cell(concurrency, streams) for concurrency in CONCURRENCY for streams in (True, False)]
    counts = {concurrency: requests_for(url, model, artifact, concurrency, seconds) for concurrency in CONCURRENCY}
    runs = []
    for number in range(rounds):
        for cell in cells if number % 2 else reversed(cells):
            runs.append(measured(url, model, artifact, cell, counts[cell.concurrency], SEED + number))
            run = runs[-1]
            print(
                f"{cell.name:12} {run.told.requests_per_s:7.1f} requests/s, first token {run.told.ttft_p50_ms:6.1f} ms,"
                f" front end {run.front_end_ms:5.2f} ms a request, others {run.others:.2f} cores"
                f" { ({kind: round(run.cpu_ms(kind), 2) for kind in run.cpu_s}) }",
                flush=True,
            )
    return runs


def has_adapter(artifact: Path) -> bool:
    return Artifact.open(artifact).adapter_path is not None


def requests_for(url: str, model: str, artifact: Path, concurrency: int, seconds: float) -> int:
    """As many as take about so long as streams; finding out warms the server up."""
    cell = Cell(concurrency, True)
    told = gateway_load.generate(url, model, artifact / "model", cell, 2 * concurrency + 8, seed=1)
    return max(2 * concurrency, 20, round(seconds * told.requests_per_s))


def measured(url: str, model: str, artifact: Path, cell: Cell, requests: int, seed: int) -> Run:
    began, before, all_before, own = time.monotonic(), cpu_seconds(), busy_seconds(), time.process_time()
    told = gateway_load.generate(url, model, artifact / "model", cell, requests, seed)
    took_s, after = time.monotonic() - began, cpu_seconds()
    used: dict[str, float] = {}
    for process, (kind, seconds) in after.items():
        used[kind] = used.get(kind, 0) + seconds - before.get(process, ("", 0.0))[1]
    others = busy_seconds() - all_before - sum(used.values()) - (time.process_time() - own)
    return Run(cell, told, used, took_s, max(0.0, others / took_s))


def cpu_seconds() -> dict[psutil.Process, tuple[str, float]]:
    """Every process below this one: its kind, and its processor time so far."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            found[process] = (kind_of(process), times.user + times.system)
    return found


def kind_of(process: psutil.Process) -> str:
    words = f"{process.name()} {' '.join(process.cmdline())}"
    return next((kind for part, kind in _KINDS if part in words), "rest")


def busy_seconds() -> float:
    """Of all processors together since the machine started."""
    times = psutil.cpu_times()
    busy: float = times.user + times.nice + times.system
    return busy


@contextlib.contextmanager
def graft_side(artifact: Path, home: Path) -> Iterator[str]:
    with graft([artifact], home, 1, ROOM if has_adapter(artifact) else NO_ADAPTERS) as server:
        yield server.url


@contextlib.contextmanager
def bare_side(artifact: Path, home: Path) -> Iterator[str]:
    adapter = Artifact.open(artifact).adapter_path
    loaded, room = ({ADAPTER: adapter}, ROOM) if adapter else ({}, NO_ADAPTERS)
    with bare(artifact / "model", home, 1, room, loaded) as (url,):
        yield url


SIDES: dict[str, Callable[[Path, Path], AbstractContextManager[str]]] = {"graft": graft_side, "bare": bare_side}

if __name__ == "__main__":
    main()
