"""The picture of the swaps: every request, coloured by the revision that answered."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.plotting import pyplot, save

_COLOURS = ("#3b6fb6", "#e08a1e")
_WRONG = "#c8452f"
_SHOWN_SWAPS = 8


def draw(runs: Mapping[str, Any], texts: Mapping[str, str], path: Path) -> None:
    """One panel for each run: requests as lines from begin to end, around the first swaps. Red marks an answer that
    failed, that came from a revision already replaced when the request began, or that is the text of no revision."""
    figure, panels = pyplot().subplots(1, len(runs), figsize=(12, 4.4), constrained_layout=True)
    colours = dict(zip(texts, _COLOURS, strict=True))
    for axes, (title, run) in zip(panels, runs.items(), strict=True):
        began, ended = run.intervals[1].since_s - 0.5, run.intervals[_SHOWN_SWAPS - 1].since_s
        in_window = (answer for answer in run.answers if began < answer.began_s < ended)
        for row, answer in enumerate(sorted(in_window, key=lambda answer: answer.began_s)):
            revision = next(iter(answer.revisions), "")
            wrong = texts.get(revision) != answer.text or any(
                interval.covers(answer) and interval.revision != revision for interval in run.intervals
            )
            colour = _WRONG if wrong else colours[revision]
            axes.plot([answer.began_s, answer.ended_s], [row, row], color=colour, linewidth=1.5)
        for before, after in itertools.pairwise(run.intervals[:_SHOWN_SWAPS]):
            axes.axvspan(max(began, before.until_s), after.since_s, color="0.88", zorder=0)
        report = run.report(texts)
        axes.set_title(f"{title}\n{report.requests} requests: {report.failed} failed, "
                       f"{report.mixed + report.stale} mixed or stale", loc="left", fontsize=10)  # fmt: skip
        axes.set_xlabel("seconds (grey: a swap is running)")
    for revision, colour in [*colours.items(), ("wrong", _WRONG)]:
        panels[0].plot([], [], color=colour, linewidth=2, label=revision)
    panels[0].set_ylabel("requests by start time")
    panels[0].legend(loc="upper left", frameon=False, fontsize=8)
    save(figure, panels, path)
