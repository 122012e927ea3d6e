"""Graft beside vLLM's API server as a picture: throughput, time to the first token, processor time a request."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gateway_load import Cell
from benchmarks.gateway_side import CONCURRENCY, Run

_LABELS = {"bare": "vLLM's API server", "graft": "Graft"}
_COLOURS = {"bare": "0.55", "graft": "#2a9d5c"}
# Of the processor time outside the engine, from below.
_KINDS = {"api_server": "0.55", "replica": "#2a9d5c", "haproxy": "#3b6fb6", "rest": "#e08a1e"}
_WIDTH = 0.38


def draw(visits: Mapping[str, Sequence[Sequence[Run]]], path: Path) -> None:
    """Bars are medians, ticks are single visits."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 4, figsize=(15, 3.8), constrained_layout=True)
    sides = [side for side in _LABELS if side in visits]
    for axes, streams in zip(panels, (True, False), strict=False):
        _bars(axes, visits, sides, streams, lambda run: run.told.requests_per_s)
        axes.set_title(f"requests/s, {'streaming' if streams else 'whole answers'}", loc="left", fontsize=10)
    _bars(panels[2], visits, sides, True, lambda run: run.told.ttft_p50_ms)
    panels[2].set_title("first token of a stream, p50, ms", loc="left", fontsize=10)
    panels[2].set_yscale("log")
    _stacks(panels[3], visits, sides)
    panels[3].set_title("CPU-ms a streamed request, engine excluded", loc="left", fontsize=10)
    for axes in panels:
        axes.set_xticks(range(len(CONCURRENCY)), list(map(str, CONCURRENCY)))
        axes.set_xlabel("callers at once")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, fontsize=8)
    panels[3].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def _bars(
    axes: Any,
    visits: Mapping[str, Sequence[Sequence[Run]]],
    sides: Sequence[str],
    streams: bool,
    measure: Callable[[Run], float],
) -> None:
    for place, side in enumerate(sides):
        for row, concurrency in enumerate(CONCURRENCY):
            found = [measure(it) for it in _of(visits[side], Cell(concurrency, streams))]
            x = row + (place - (len(sides) - 1) / 2) * _WIDTH
            label = _LABELS[side] if row == 0 else None
            axes.bar(x, statistics.median(found), _WIDTH, color=_COLOURS[side], label=label)
            axes.plot([x] * len(found), found, "_", color="black", markersize=7)


def _stacks(axes: Any, visits: Mapping[str, Sequence[Sequence[Run]]], sides: Sequence[str]) -> None:
    labelled = set()
    for place, side in enumerate(sides):
        for row, concurrency in enumerate(CONCURRENCY):
            runs, bottom = _of(visits[side], Cell(concurrency, streams=True)), 0.0
            for kind, colour in _KINDS.items():
                height = statistics.median(it.cpu_ms(kind) for it in runs)
                label = kind if height and kind not in labelled else None
                labelled |= {kind} if height else set()
                x = row + (place - (len(sides) - 1) / 2) * _WIDTH
                axes.bar(x, height, _WIDTH * 0.95, bottom=bottom, color=colour, label=label)
                bottom += height


def _of(visits: Sequence[Sequence[Run]], cell: Cell) -> list[Run]:
    return [run for runs in visits for run in runs if run.cell == cell]
