"""The reference's next-token distributions for many rows, stored exactly in a small form.

A distribution has as many numbers as the vocabulary. The hidden state that the output head turns into a distribution
has only as many as the model is wide: 42 times fewer in Llama 3.2 3B. So the states are stored, and the output layers
are computed again for each comparison. Nothing is rounded or left out. The states are in float32 in an unlinked
temporary file (TMPDIR), which disappears with the process, even with a killed one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from convert.errors import OutputUnwritable
from convert.progress import Progress
from convert.quality.models.streamed_model import StreamedModel, Variant
from convert.quality.tokenized_text import TokenizedText

if TYPE_CHECKING:
    import torch

# In float64: 16 MB at a vocabulary of 128k.
_COMPARED_POSITIONS = 16


@dataclass(frozen=True)
class ModelComparison:
    """A model beside the stored distributions.

    `divergences`: KL(stored || model) in nats at every position of the measured rows; `agreements`: whether both have
    the same most probable token there. `token_log_probs`: for each row of `tokens.all` a tensor (tokens - 1) with the
    model's log-probability of every token but the first; `expected_log_probs`: the same of the stored distributions.
    """

    divergences: torch.Tensor
    agreements: torch.Tensor
    token_log_probs: tuple[torch.Tensor, ...]
    expected_log_probs: tuple[torch.Tensor, ...]


class ReferenceLogits:
    """Hidden states (positions, width) of every row, and the model whose output layers make distributions of them."""

    def __init__(self, model: StreamedModel, tokens: TokenizedText) -> None:
        self._model, self._tokens = model, tokens
        self._states = _Matrix()

    def compute(self, alone: Variant, progress: Progress) -> ModelComparison:
        """Run the model over the text, store its states, and compare the model in the context `alone` with it.

        Raises OutputUnwritable where the disk is full.
        """
        comparison = _Comparison(self._tokens)
        passes = self._model.hidden_states(self._tokens.all, (nullcontext, alone), "reference", progress)
        for rows, (states, of_alone) in passes:
            self._states.write(states)
            comparison.add(rows, self._model.log_probs(states), self._model.log_probs(of_alone, alone))
        return comparison.result()

    def compare(self, model: StreamedModel, model_name: str, progress: Progress) -> ModelComparison:
        """Run a model over the same text. `model_name` is for the progress."""
        comparison, position = _Comparison(self._tokens), 0
        for rows, (states,) in model.hidden_states(self._tokens.all, (nullcontext,), model_name, progress):
            expected = self.log_probs(position, position + len(states))
            comparison.add(rows, expected, model.log_probs(states))
            position += len(states)
        return comparison.result()

    def log_probs(self, start: int, stop: int) -> Iterator[torch.Tensor]:
        """The reference's log-probabilities at a range of the positions, in the blocks of `StreamedModel`."""
        return self._model.log_probs(self._states.read(start, stop))


class _Comparison:
    """Collects the figures of a comparison, group of rows by group."""

    def __init__(self, tokens: TokenizedText) -> None:
        self._measured = sum(row.shape[1] - 1 for row in tokens.measured)
        self._divergences: list[torch.Tensor] = []
        self._agreements: list[torch.Tensor] = []
        self._log_probs: list[torch.Tensor] = []
        self._expected: list[torch.Tensor] = []

    def add(
        self, rows: Sequence[torch.Tensor], expected: Iterable[torch.Tensor], actual: Iterable[torch.Tensor]
    ) -> None:
        """Add whole rows. Both kinds of log-probabilities come in blocks of the same positions."""
        import torch

        next_ids = torch.cat([row[0, 1:] for row in rows])
        log_probs, of_expected, start = [], [], 0
        for p, q in zip(expected, actual, strict=True):
            ids = next_ids[start : start + len(p), None]
            start += len(p)
            self._divergences.append(divergences(p, q))
            self._agreements.append(p.argmax(-1) == q.argmax(-1))
            of_expected.append(p.gather(1, ids)[:, 0])
            log_probs.append(q.gather(1, ids)[:, 0])
        lengths = [row.shape[1] - 1 for row in rows]
        self._log_probs += torch.cat(log_probs).split(lengths)
        self._expected += torch.cat(of_expected).split(lengths)

    def result(self) -> ModelComparison:
        import torch

        return ModelComparison(
            torch.cat(self._divergences)[: self._measured],
            torch.cat(self._agreements)[: self._measured],
            tuple(self._log_probs),
            tuple(self._expected),
        )


def divergences(expected: torch.Tensor, actual: torch.Tensor) -> torch.Tensor:
    """KL(p || q) = Σ p·(log p - log q) in nats at every position, of log-probabilities (positions, vocabulary).

    In float64: sums over a whole vocabulary of differences near float32's resolution.
    """
    import torch

    of_positions = []
    for p, q in zip(expected.split(_COMPARED_POSITIONS), actual.split(_COMPARED_POSITIONS), strict=True):
        log_p = p.double()
        of_positions.append((log_p.exp() * (log_p - q.double())).sum(-1).clamp_min(0))
    return torch.cat(of_positions)


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

    def read(self, start: int, stop: int) -> torch.Tensor:
        import torch

        self._file.seek(4 * self._width * start)
        content = bytearray(self._file.read(4 * self._width * (stop - start)))
        return torch.frombuffer(content, dtype=torch.float32).view(-1, self._width)
