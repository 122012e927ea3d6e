"""The rows that every model runs over: those that are measured, and the pieces that become golden prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from convert.errors import TextUnreadable
from convert.quality.text import Row, Text
from convert.quality.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

MAX_ROW_TOKENS = 256
# 256 full rows. What is kept of a token is a vector as wide as the model (`kept`): 1 GB at a width of 4096.
MAX_TOKENS = 256 * MAX_ROW_TOKENS

PROMPTS = 32
PROMPT_TOKENS = 48
# Shorter ones say little.
_SHORTEST_PROMPT = 8


@dataclass(frozen=True)
class Rows:
    """Token ids (1, tokens) of the measured rows and of further pieces of them.

    `written` says for each measured row which of its tokens, the first left out, a model is there to write: those of
    the assistant's answers in a chat, all of a text.

    The golden prompts are the first `prompt_tokens` tokens of the rows in `heads`, whose log-probabilities come with
    the measured row, and all of `pieces`.
    """

    measured: tuple[torch.Tensor, ...]
    written: tuple[torch.Tensor, ...]
    heads: tuple[int, ...]
    prompt_tokens: int
    pieces: tuple[torch.Tensor, ...]

    @property
    def all(self) -> tuple[torch.Tensor, ...]:
        return self.measured + self.pieces

    def pick_written(self, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Of a value for every token of `all` but each row's first, those at written tokens of measured rows."""
        picked = [row[flags] for row, flags in zip(values, self.written, strict=False)]
        return [row for row in picked if row.numel()]


def tokenize(text: Text, tokenizer: Tokenizer) -> Rows:
    """Every row that has two tokens or more, cut to MAX_ROW_TOKENS, until there are MAX_TOKENS.

    Raises TextUnreadable where nothing is left.
    """
    import torch

    rows: list[list[int]] = []
    written: list[list[bool]] = []
    total = 0
    for row in text.rows:
        ids = tokenizer.ids(row)[: min(MAX_ROW_TOKENS, MAX_TOKENS - total)]
        if len(ids) > 1:
            rows.append(ids)
            written.append(_written(row, ids, tokenizer)[1:])
            total += len(ids)
    if not rows:
        raise TextUnreadable(f"{text.name}: no row has two tokens or more, so there is nothing to compare")
    heads = _spread(len(rows), PROMPTS)
    length, pieces = _pieces(rows, tokenizer.special_ids, PROMPTS - len(heads))
    return Rows(
        measured=tuple(torch.tensor([ids]) for ids in rows),
        written=tuple(torch.tensor(flags) for flags in written),
        heads=heads,
        prompt_tokens=length,
        pieces=tuple(torch.tensor([ids]) for ids in pieces),
    )


def token_rows(text: Text, tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids of every row that has two tokens or more, cut to MAX_ROW_TOKENS: to fit on, not to measure."""
    cut = (tokenizer.ids(row)[:MAX_ROW_TOKENS] for row in text.rows)
    return [ids for ids in cut if len(ids) > 1]


def _written(row: Row, ids: Sequence[int], tokenizer: Tokenizer) -> list[bool]:
    """Which tokens an assistant writes: from where its answer begins in the template's text to where it is whole.

    An answer whose beginning the template renders otherwise once it is there is left out.
    """
    if isinstance(row, str):
        return [True] * len(ids)
    flags = [False] * len(ids)
    for place, message in enumerate(row):
        if message["role"] == "assistant" and place:
            before, after = tokenizer.prompt_ids(row[:place]), tokenizer.ids(row[: place + 1])
            begin, end = _common(ids, before), _common(ids, after)
            if begin == len(before):
                flags[begin:end] = [True] * (end - begin)
    return flags


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of the common beginning."""
    length = 0
    for one, other in zip(left, right, strict=False):
        if one != other:
            break
        length += 1
    return length


def _spread(count: int, wanted: int) -> tuple[int, ...]:
    """At most `wanted` of `count` places, evenly."""
    return tuple(dict.fromkeys(place * count // min(count, wanted) for place in range(min(count, wanted))))


def _pieces(rows: Sequence[list[int]], special: frozenset[int], wanted: int) -> tuple[int, list[list[int]]]:
    """The longest prompts with which the rows give `wanted` pieces behind their heads, or the shortest there are."""
    length, found = PROMPT_TOKENS, list(_cut(rows, special, PROMPT_TOKENS))
    while len(found) < wanted and length > _SHORTEST_PROMPT:
        length -= 1
        found = list(_cut(rows, special, length))
    return length, found[:wanted]


def _cut(rows: Sequence[list[int]], special: frozenset[int], length: int) -> Iterator[list[int]]:
    """What follows the first `length` tokens of each row, in pieces of that length.

    A row's leading special token is put before each: models give it the attention that nothing else deserves, and
    without it their distributions are noise (Xiao et al., https://arxiv.org/abs/2309.17453).
    """
    for row in rows:
        lead = row[:1] if row[0] in special else []
        step = length - len(lead)
        for start in range(length, len(row), step):
            piece = lead + row[start : start + step]
            if len(piece) >= _SHORTEST_PROMPT:
                yield piece
