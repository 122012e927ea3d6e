"""Sides that are compared take turns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def in_turns(sides: Sequence[str], turns: int) -> Iterator[tuple[int, str]]:
    """The number of a turn and the side whose it is; every turn the other way round, so that drift meets all sides."""
    for number in range(turns):
        for side in sides if number % 2 == 0 else reversed(sides):
            yield number, side
