"""docs/report.md: one screen for each benchmark, and no missed goal that is hidden."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.record import RESULTS
from benchmarks.report import Result, page
from benchmarks.report_sections import SECTIONS, Section

SWAP = next(section for section in SECTIONS if section.name == "swap")


def copy_of_swap(directory: Path, value: float) -> None:
    """The committed result, with another value for one figure that is not a headline figure and has a goal."""
    document = json.loads((RESULTS / "swap.json").read_text())
    document["figures"]["extra"] = {"value": value, "unit": "s", "goal": "<= 1", "spread": None}
    (directory / "swap.json").write_text(json.dumps(document))


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.name)
def test_every_headline_figure_exists_in_the_result(section: Section) -> None:
    result = Result.read(section, RESULTS)

    assert [key for key in section.headline if key not in result.figures] == []
    assert result.claim
    assert len(section.headline) <= 8


def test_every_committed_result_is_on_the_page() -> None:
    assert {path.stem for path in RESULTS.glob("*.json")} == {section.name for section in SECTIONS}


def test_a_headline_figure_that_the_result_lacks_fails_the_page() -> None:
    unknown = replace(SWAP, headline={"no_such_figure": "Nothing"})

    with pytest.raises(KeyError, match="no_such_figure"):
        page(sections=[unknown])


def test_a_missed_goal_is_shown_although_it_is_no_headline_figure(tmp_path: Path) -> None:
    copy_of_swap(tmp_path, 2)

    text = page(tmp_path)

    assert "**1 missed**" in text
    assert "| extra | 2 s |  | <= 1: **missed** | `extra` |" in text


def test_a_met_goal_that_is_no_headline_figure_is_only_counted(tmp_path: Path) -> None:
    copy_of_swap(tmp_path, 1)

    assert "`extra`" not in page(tmp_path)
    assert "missed**" not in page(tmp_path)
    assert len(re.findall(r"\b8 of 8 met", page(tmp_path))) == 2, "in the summary and on its screen"


def test_the_page_misses_exactly_the_goals_that_the_results_miss() -> None:
    results = [Result.read(section, RESULTS) for section in SECTIONS]
    missed = sum(not figure.meets_goal for result in results for figure in result.figures.values())

    assert page().count(": **missed** |") == missed
