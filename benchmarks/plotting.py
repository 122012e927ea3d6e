"""What all pictures of the benchmarks share."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any


def pyplot() -> Any:
    """matplotlib.pyplot with the backend that needs no display; imported here because it takes a second."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save(figure: Any, axes: Iterable[Any], path: Path) -> None:
    """Write the picture, without the upper and right border of the axes."""
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
