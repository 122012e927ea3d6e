"""Next-token distributions of many rows, kept exactly without keeping them.

A distribution has as many numbers as the vocabulary; what it is made of, the state that the model's head reads, only
as many as the model is wide: 42 times fewer in Llama 3.2 3B. So states and the head's weight are kept, in float32 in
unlinked temporary files (TMPDIR), and log_softmax(state · headᵀ) is computed again where it is compared. Nothing is
rounded or left out, mapped pages count as cache, and the files are gone with the process, even a killed one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from convert.errors import OutputUnwritable
from convert.quality.forward import BLOCK

if TYPE_CHECKING:
    import torch


class Kept:
    """States (positions, width) of rows, appended one row after another, and the head (vocabulary, width) they meet."""

    def __init__(self) -> None:
        self._states = _Matrix()
        self._head = _Matrix()
        self._ends = [0]

    def append(self, states: torch.Tensor) -> None:
        """The states of one row."""
        self._states.write(states)
        self._ends.append(self._ends[-1] + states.shape[0])

    def set_head(self, weight: torch.Tensor) -> None:
        self._head.write(weight)

    def log_probs(self, row: int) -> Iterator[torch.Tensor]:
        """As `forward.log_probs` gave them: with equal states and an equal head, equal bits."""
        from torch.nn.functional import linear

        head = self._head.mapped()
        states = self._states.mapped()[self._ends[row] : self._ends[row + 1]]
        for block in states.split(BLOCK):
            yield linear(block, head).log_softmax(-1)


class _Matrix:
    """Rows of float32 in a file without a name."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="graft-")  # noqa: SIM115
        self._width = 0

    def write(self, rows: torch.Tensor) -> None:
        self._width = rows.shape[1]
        try:
            self._file.write(memoryview(rows.detach().float().contiguous().numpy()))
            self._file.flush()
        except OSError as cause:
            raise OutputUnwritable(
                f"{Path(tempfile.gettempdir())} has no room for the reference's states ({cause}). "
                "Free some, set TMPDIR to a larger disk, or measure on fewer rows."
            ) from cause

    def mapped(self) -> torch.Tensor:
        """All rows; pages are read when they are used."""
        import numpy
        import torch

        content = numpy.memmap(self._file, dtype=numpy.float32, mode="c")
        return torch.from_numpy(content).view(-1, self._width)
