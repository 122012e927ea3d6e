"""The picture of the faults: time to recovery and requests without an answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.faults.run import FaultResult
from benchmarks.plotting import pyplot, save

_COLOURS = {"refused": "#e0b03a", "broken": "#e08a1e", "unclear": "#9c4fb0", "hung": "#555555", "wrong": "#c8452f"}


def draw(rows: Sequence[FaultResult], path: Path) -> None:
    """Left: seconds until recovery. Right: requests without an answer, by outcome."""
    figure, (times, requests) = pyplot().subplots(
        1, 2, figsize=(12, 0.6 + 0.3 * len(rows)), sharey=True, constrained_layout=True
    )
    positions = range(len(rows))
    times.barh(positions, [row.recovery_s for row in rows], color="#3b6fb6")
    times.set_yticks(positions, [row.name for row in rows], fontsize=8)
    times.invert_yaxis()
    times.set_title("seconds until recovery", loc="left", fontsize=10)
    left = [0] * len(rows)
    for outcome, colour in _COLOURS.items():
        counts = [row.outcomes.get(outcome, 0) for row in rows]
        requests.barh(positions, counts, left=left, color=colour, label=outcome)
        left = [before + more for before, more in zip(left, counts, strict=True)]
    total = sum(sum(row.outcomes.values()) for row in rows)
    requests.set_title(f"requests without an answer, of {total}", loc="left", fontsize=10)
    requests.legend(loc="center right", frameon=False, fontsize=8)
    save(figure, (times, requests), path)
