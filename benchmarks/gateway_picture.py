"""The picture of the gateway benchmark: throughput, time to first token, processor time for each request."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gateway_load import Workload
from benchmarks.gateway_side import CONCURRENCY, Run
from benchmarks.plotting import pyplot, save

_LABELS = {"bare": "vLLM's API server", "graft": "Graft"}
_COLOURS = {"bare": "0.55", "graft": "#2a9d5c"}
# Kinds of process outside the engine, in the order of the stack.
_KINDS = {"api_server": "0.55", "replica": "#2a9d5c", "haproxy": "#3b6fb6", "rest": "#e08a1e"}
_WIDTH = 0.38


def draw(visits: Mapping[str, Sequence[Sequence[Run]]], path: Path) -> None:
    """Bars are medians, ticks are single visits."""
    figure, panels = pyplot().subplots(1, 4, figsize=(15, 3.8), constrained_layout=True)
    sides = [side for side in _LABELS if side in visits]
    for axes, streams in zip(panels, (True, False), strict=False):
        _bars(axes, visits, sides, streams, lambda run: run.load.requests_per_s)
        axes.set_title(f"requests/s, {'streaming' if streams else 'whole answers'}", loc="left", fontsize=10)
    _bars(panels[2], visits, sides, True, lambda run: run.load.ttft_p50_ms)
    panels[2].set_title("first token of a stream, p50, ms", loc="left", fontsize=10)
    panels[2].set_yscale("log")
    _stacks(panels[3], visits, sides)
    panels[3].set_title("CPU-ms a streamed request, engine excluded", loc="left", fontsize=10)
    for axes in panels:
        axes.set_xticks(range(len(CONCURRENCY)), list(map(str, CONCURRENCY)))
        axes.set_xlabel("callers at once")
    panels[0].legend(frameon=False, fontsize=8)
    panels[3].legend(frameon=False, fontsize=8)
    save(figure, panels, path)


def _bars(
    axes: Any,
    visits: Mapping[str, Sequence[Sequence[Run]]],
    sides: Sequence[str],
    streams: bool,
    measure: Callable[[Run], float],
) -> None:
    for position, side in enumerate(sides):
        for row, concurrency in enumerate(CONCURRENCY):
            samples = [measure(run) for run in _of(visits[side], Workload(concurrency, streams))]
            x = row + (position - (len(sides) - 1) / 2) * _WIDTH
            label = _LABELS[side] if row == 0 else None
            axes.bar(x, statistics.median(samples), _WIDTH, color=_COLOURS[side], label=label)
            axes.plot([x] * len(samples), samples, "_", color="black", markersize=7)


def _stacks(axes: Any, visits: Mapping[str, Sequence[Sequence[Run]]], sides: Sequence[str]) -> None:
    labelled = set()
    for position, side in enumerate(sides):
        for row, concurrency in enumerate(CONCURRENCY):
            runs, bottom = _of(visits[side], Workload(concurrency, streams=True)), 0.0
            for kind, colour in _KINDS.items():
                height = statistics.median(run.cpu_ms(kind) for run in runs)
                label = kind if height and kind not in labelled else None
                labelled |= {kind} if height else set()
                x = row + (position - (len(sides) - 1) / 2) * _WIDTH
                axes.bar(x, height, _WIDTH * 0.95, bottom=bottom, color=colour, label=label)
                bottom += height


def _of(visits: Sequence[Sequence[Run]], workload: Workload) -> list[Run]:
    return [run for runs in visits for run in runs if run.workload == workload]
