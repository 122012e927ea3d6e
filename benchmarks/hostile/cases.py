"""What became of one case."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Problem = Literal["", "crashed", "hung", "escaped", "leaked", "killed", "accepted"]
PROBLEMS: tuple[Problem, ...] = ("crashed", "hung", "escaped", "leaked", "killed", "accepted")


@dataclass(frozen=True)
class CaseResult:
    """One case at one interface or file format; `problem` is empty where it was handled correctly."""

    surface: str
    problem: Problem = ""
    detail: str = ""
