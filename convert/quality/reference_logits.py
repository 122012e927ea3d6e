"""The reference's next-token distributions for many rows, stored exactly in a small form.

A distribution has as many numbers as the vocabulary. The hidden state that the output head turns into a distribution
has only as many as the model is wide: 42 times fewer in Llama 3.2 3B. So the states and the head's weight are stored,
and the output layers are computed again for each comparison. Nothing is rounded or left out. Both are
in float32 in unlinked temporary files (TMPDIR): memory-mapped pages count as cache, and the files disappear with the
process, even with a killed one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.errors import OutputUnwritable
from convert.progress import Progress
from convert.quality.float32_model import causal_lm, hidden_states, log_probs, merged_head, token_log_probs
from convert.quality.output_layers import output_layers
from convert.quality.tokenized_text import TokenizedText

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ModelComparison:
    """A model beside the stored distributions.

    `divergences`: KL(stored || model) in nats at every position of the measured rows; `agreements`: whether both have
    the same most probable token there. `token_log_probs`: for each row of `tokens.all` a tensor (tokens - 1) with the
    model's log-probability of every token but the first.
    """

    divergences: torch.Tensor
    agreements: torch.Tensor
    token_log_probs: tuple[torch.Tensor, ...]


class ReferenceLogits:
    """Hidden states (positions, width) of many rows, appended row by row, and the output head (vocabulary, width)."""

    def __init__(self) -> None:
        self._states = _Matrix()
        self._head = _Matrix()
        self._output_layers: Any = None
        self._ends = [0]

    def append(self, states: torch.Tensor) -> None:
        """Store the states (positions, width) of one row. Raises OutputUnwritable where the disk is full."""
        self._states.write(states)
        self._ends.append(self._ends[-1] + states.shape[0])

    def set_output_layers(self, model: Any) -> None:
        """Store those of the model, with its adapter in the head. Raises OutputUnwritable where the disk is full."""
        with merged_head(model) as weight:
            self._head.write(weight)
        self._output_layers = output_layers(causal_lm(model), self._head.mapped())

    def log_probs(self, row: int) -> Iterator[torch.Tensor]:
        """What `float32_model.log_probs` gave for the row, bit for bit, as blocks (at most BLOCK, vocabulary)."""
        states = self._states.mapped()[self._ends[row] : self._ends[row + 1]]
        return log_probs(self._output_layers, states)

    def compare(self, model: Any, tokens: TokenizedText, phase: str, progress: Progress) -> ModelComparison:
        """Run a model over the text of which the measured rows are stored. `phase` names it in the progress."""
        import torch

        divergences, agreements, row_log_probs = [], [], []
        for number, (row, states) in enumerate(hidden_states(model, tokens.all, phase, progress)):
            distributions = list(log_probs(model, states))
            if number < len(tokens.measured):
                divergence, agreement = self._compare_row(number, distributions)
                divergences.append(divergence)
                agreements.append(agreement)
            row_log_probs.append(token_log_probs(distributions, row))
        return ModelComparison(torch.cat(divergences), torch.cat(agreements), tuple(row_log_probs))

    def _compare_row(self, row: int, blocks: Iterable[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """At each position of the row KL(p || q) = Σ p·(log p - log q) in nats, and whether p and q have the same most
        probable token.

        p is the stored distribution. `blocks`: the log-probabilities of q, in blocks as those of `log_probs`.
        """
        import torch

        divergences, agreements = [], []
        for expected, other in zip(self.log_probs(row), blocks, strict=True):
            # In float64: sums over a whole vocabulary of differences near float32's resolution.
            log_p, log_q = expected.double(), other.double()
            divergences.append((log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0))
            agreements.append(expected.argmax(-1) == other.argmax(-1))
        return torch.cat(divergences), torch.cat(agreements)


class _Matrix:
    """A float32 matrix in an unlinked temporary file."""

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
        """The whole matrix, memory-mapped: pages are read when they are used."""
        import numpy
        import torch

        content = numpy.memmap(self._file, dtype=numpy.float32, mode="c")
        return torch.from_numpy(content).view(-1, self._width)
