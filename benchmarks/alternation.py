"""The order in which compared sides run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def alternating(sides: Sequence[str], turns: int) -> Iterator[tuple[int, str]]:
    """Yield the number of the turn and the side to run. Every turn reverses the order of the sides, so that drift of
    the machine affects all sides alike."""
    for number in range(turns):
        for side in sides if number % 2 == 0 else reversed(sides):
            yield number, side
