"""The tokenized text that every model runs over: the measured rows, and pieces of them that become golden prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from convert.errors import TextUnreadable
from convert.inputs.chat.tokenizer import Row, Tokenizer
from convert.quality.text import Text

if TYPE_CHECKING:
    import torch

MAX_ROW_TOKENS = 256
# 256 full rows. One hidden state is kept for each token (`reference_logits`): 1 GB at a width of 4096.
MAX_TOKENS = 256 * MAX_ROW_TOKENS

PROMPTS = 32
PROMPT_TOKENS = 48
# The log-probabilities of shorter prompts say little.
_SHORTEST_PROMPT = 8


@dataclass(frozen=True)
class TokenizedText:
    """Token ids, each tensor (1, tokens), of the measured rows and of further pieces of them.

    `answer_masks`: for each measured row a bool tensor (tokens - 1) that is True at the tokens that a model should
    write: the assistant's answers in a chat, every token of a plain text. The first token of a row has no entry.

    The golden prompts are the first `prompt_tokens` tokens of the measured rows with the indices `prompt_rows`, whose
    log-probabilities are computed with the row, and all of `pieces`.
    """

    measured: tuple[torch.Tensor, ...]
    answer_masks: tuple[torch.Tensor, ...]
    prompt_rows: tuple[int, ...]
    prompt_tokens: int
    pieces: tuple[torch.Tensor, ...]

    @property
    def all(self) -> tuple[torch.Tensor, ...]:
        """The measured rows, then the pieces."""
        return self.measured + self.pieces

    def select_answers(self, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """From one tensor (tokens - 1) for each row of `all`, the values at the answer tokens of the measured rows."""
        selected = [row[mask] for row, mask in zip(values, self.answer_masks, strict=False)]
        return [row for row in selected if row.numel()]


def tokenize(text: Text, tokenizer: Tokenizer) -> TokenizedText:
    """Every row of two tokens or more, cut to MAX_ROW_TOKENS, until there are MAX_TOKENS.

    Raises TextUnreadable where no row is left.
    """
    import torch

    rows: list[list[int]] = []
    masks: list[list[bool]] = []
    total = 0
    for row in text.rows:
        ids = tokenizer.ids(row)[: min(MAX_ROW_TOKENS, MAX_TOKENS - total)]
        if len(ids) > 1:
            rows.append(ids)
            masks.append(_answer_mask(row, ids, tokenizer)[1:])
            total += len(ids)
    if not rows:
        raise TextUnreadable(f"{text.name}: no row has two tokens or more, so there is nothing to compare")
    prompt_rows = _spread(len(rows), PROMPTS)
    prompt_tokens, pieces = _pieces(rows, tokenizer.special_ids, PROMPTS - len(prompt_rows))
    return TokenizedText(
        measured=tuple(torch.tensor([ids]) for ids in rows),
        answer_masks=tuple(torch.tensor(mask) for mask in masks),
        prompt_rows=prompt_rows,
        prompt_tokens=prompt_tokens,
        pieces=tuple(torch.tensor([ids]) for ids in pieces),
    )


def token_rows(text: Text, tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids of every row of two tokens or more, cut to MAX_ROW_TOKENS: for fitting, not for measuring."""
    truncated = (tokenizer.ids(row)[:MAX_ROW_TOKENS] for row in text.rows)
    return [ids for ids in truncated if len(ids) > 1]


def _answer_mask(row: Row, ids: Sequence[int], tokenizer: Tokenizer) -> list[bool]:
    """True at the tokens of the assistant's answers, found by rendering the chat up to each answer and with it.

    Some templates render the text before an answer differently once the answer is there. Such an answer is left out.
    """
    if isinstance(row, str):
        return [True] * len(ids)
    mask = [False] * len(ids)
    for index, message in enumerate(row):
        if message["role"] == "assistant" and index:
            before, after = tokenizer.prompt_ids(row[:index]), tokenizer.ids(row[: index + 1])
            begin, end = _common_prefix(ids, before), _common_prefix(ids, after)
            if begin == len(before):
                mask[begin:end] = [True] * (end - begin)
    return mask


def _common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """The length of the common prefix."""
    length = 0
    for left_id, right_id in zip(left, right, strict=False):
        if left_id != right_id:
            break
        length += 1
    return length


def _spread(count: int, wanted: int) -> tuple[int, ...]:
    """At most `wanted` indices below `count`, evenly spaced."""
    return tuple(dict.fromkeys(number * count // min(count, wanted) for number in range(min(count, wanted))))


def _pieces(rows: Sequence[list[int]], special: frozenset[int], wanted: int) -> tuple[int, list[list[int]]]:
    """The largest prompt length at which the rows yield `wanted` pieces, and the pieces.

    Where no length yields as many, the shortest length and the pieces that it yields.
    """
    length, pieces = PROMPT_TOKENS, list(_cut(rows, special, PROMPT_TOKENS))
    while len(pieces) < wanted and length > _SHORTEST_PROMPT:
        length -= 1
        pieces = list(_cut(rows, special, length))
    return length, pieces[:wanted]


def _cut(rows: Sequence[list[int]], special: frozenset[int], length: int) -> Iterator[list[int]]:
    """The tokens after the first `length` of each row, in pieces of that length.

    Each piece begins with the special token that its row begins with. Models use that token as an attention sink, and
    without it their distributions are noise (Xiao et al., https://arxiv.org/abs/2309.17453).
    """
    for row in rows:
        lead = row[:1] if row[0] in special else []
        step = length - len(lead)
        for start in range(length, len(row), step):
            piece = lead + row[start : start + step]
            if len(piece) >= _SHORTEST_PROMPT:
                yield piece
