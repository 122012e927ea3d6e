"""The swaps as a picture: every request, by the revision that answered it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_COLOURS = ("#3b6fb6", "#e08a1e")
_WRONG = "#c8452f"
_SHOWN_SWAPS = 8


def draw(runs: Mapping[str, Any], texts: Mapping[str, str], path: Path) -> None:
    """One panel a run: requests as lines from begin to end, around the first swaps. Red is an answer that failed,
    came late from a revision that was replaced before it was asked for, or belongs to neither."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(runs), figsize=(12, 4.4), constrained_layout=True)
    colours = dict(zip(texts, _COLOURS, strict=True))
    for axes, (title, run) in zip(panels, runs.items(), strict=True):
        began, ended = run.reigns[1].since_s - 0.5, run.reigns[_SHOWN_SWAPS - 1].since_s
        shown = sorted((it for it in run.answers if began < it.began_s < ended), key=lambda it: it.began_s)
        for row, it in enumerate(shown):
            revision = next(iter(it.revisions), "")
            wrong = texts.get(revision) != it.text or any(
                reign.covers(it) and reign.revision != revision for reign in run.reigns
            )
            axes.plot([it.began_s, it.ended_s], [row, row], color=_WRONG if wrong else colours[revision], linewidth=1.5)
        for before, after in itertools.pairwise(run.reigns[:_SHOWN_SWAPS]):
            axes.axvspan(max(began, before.until_s), after.since_s, color="0.88", zorder=0)
        report = run.report(texts)
        axes.set_title(f"{title}\n{report.requests} requests: {report.failed} failed, "
                       f"{report.mixed + report.stale} mixed or stale", loc="left", fontsize=10)  # fmt: skip
        axes.set_xlabel("seconds (grey: a swap is running)")
        axes.spines[["top", "right"]].set_visible(False)
    for revision, colour in [*colours.items(), ("wrong", _WRONG)]:
        panels[0].plot([], [], color=colour, linewidth=2, label=revision)
    panels[0].set_ylabel("requests in order of their begin")
    panels[0].legend(loc="upper left", frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
