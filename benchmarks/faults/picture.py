"""The faults as a picture: how long each was felt, and by how many."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.faults.run import Row

_COLOURS = {"refused": "#e0b03a", "broken": "#e08a1e", "unclear": "#9c4fb0", "hung": "#555555", "wrong": "#c8452f"}


def draw(rows: Sequence[Row], path: Path) -> None:
    """On the left the seconds until everything was whole again, on the right the requests that were not answered."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (times, requests) = pyplot.subplots(
        1, 2, figsize=(12, 0.6 + 0.3 * len(rows)), sharey=True, constrained_layout=True
    )
    places = range(len(rows))
    times.barh(places, [it.recovery_s for it in rows], color="#3b6fb6")
    times.set_yticks(places, [it.name for it in rows], fontsize=8)
    times.invert_yaxis()
    times.set_title("seconds until everything was whole again", loc="left", fontsize=10)
    left = [0] * len(rows)
    for outcome, colour in _COLOURS.items():
        counts = [it.outcomes.get(outcome, 0) for it in rows]
        requests.barh(places, counts, left=left, color=colour, label=outcome)
        left = [before + more for before, more in zip(left, counts, strict=True)]
    total = sum(sum(it.outcomes.values()) for it in rows)
    requests.set_title(f"requests without an answer, of {total}", loc="left", fontsize=10)
    requests.legend(loc="center right", frameon=False, fontsize=8)
    for axes in (times, requests):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
