"""golden.json: the answers that a server of the artifact must give, collected while the result was measured."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from convert.artifact import Golden, GoldenChat, GoldenPrompt
from convert.artifact.durable_files import create_file
from convert.errors import TextUnreadable
from convert.inputs.chat.tokenizer import Message, Tokenizer
from convert.quality.examination import Examination
from convert.quality.reference import Reference
from convert.quality.tokenized_text import TokenizedText

if TYPE_CHECKING:
    import torch

_CHATS = 4
_DECIMALS = 6
# Chats that every golden.json holds, also where the text has none.
_FIXED_CHATS: tuple[list[Message], ...] = (
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "user", "content": "Hello! My name is Ada."},
        {"role": "assistant", "content": "Hello, Ada. What can I do for you?"},
        {"role": "user", "content": "Tell me what my name is, in “quotes”.\n\nThank you."},
    ],
)


def collect_golden(expected: Reference, examination: Examination, model: Path, *, separate: bool) -> Golden:
    """The golden answers of a measured result. `model`: its directory; `separate`: whether its adapter stays separate.

    There are 32 prompts of at most 48 tokens (fewer where the text is shorter), spread over the measured rows or cut
    from them, and chats: those of the text, of the canaries and two fixed ones, none where the model has no chat
    template. Templates that write a date are rendered with `tokenizer.CHAT_SETTINGS`; a server must do the same.
    """
    tokenizer = Tokenizer.open(model)
    base = expected.base_token_log_probs if separate else None
    return Golden(
        prompts=tuple(_prompts(expected.tokens, expected.token_log_probs, examination.token_log_probs, base)),
        chats=tuple(_chats(tokenizer, expected)) if tokenizer.has_template else (),
        canaries=tuple(canary.golden for canary in expected.canaries),
        stop_token_ids=tokenizer.stop_ids,
    )


def golden_bytes(golden: Golden) -> bytes:
    """The content of golden.json: the same bytes for the same golden answers."""
    document = golden.model_dump(mode="json")
    return (json.dumps(document, ensure_ascii=False, separators=(",", ":"), allow_nan=False) + "\n").encode()


def write_golden(path: Path, golden: Golden) -> str:
    """Write the file, which is durable when this returns. Returns its SHA-256."""
    content = golden_bytes(golden)
    create_file(path, content)
    return hashlib.sha256(content).hexdigest()


def _prompts(
    tokens: TokenizedText,
    reference: Sequence[torch.Tensor],
    result: Sequence[torch.Tensor],
    base: Sequence[torch.Tensor] | None,
) -> Iterator[GoldenPrompt]:
    for index in (*tokens.prompt_rows, *range(len(tokens.measured), len(tokens.all))):
        ids = tokens.all[index][0, : tokens.prompt_tokens].tolist()
        count = len(ids) - 1
        yield GoldenPrompt(
            token_ids=tuple(ids),
            reference=_rounded(reference[index][:count]),
            result=_rounded(result[index][:count]),
            base=_rounded(base[index][:count]) if base else None,
        )


def _rounded(log_probs: torch.Tensor) -> tuple[float, ...]:
    # + 0.0 turns -0.0 into 0.0.
    return tuple(round(value, _DECIMALS) + 0.0 for value in log_probs.tolist())


def _chats(tokenizer: Tokenizer, expected: Reference) -> Iterator[GoldenChat]:
    questions = [_question(chat) for chat in expected.text.chats]
    chats = [chat for chat in questions if chat][:_CHATS] + [list(canary.messages) for canary in expected.canaries]
    unique = {json.dumps(chat): chat for chat in (*chats, *_FIXED_CHATS)}
    for chat in unique.values():
        try:
            rendered = tokenizer.render(chat, prompt=True)
        except TextUnreadable:  # a template may refuse a fixed chat for roles that the user's chats never have
            if chat in _FIXED_CHATS:
                continue
            raise
        yield GoldenChat(messages=tuple(chat), rendered=rendered)


def _question(chat: list[Message]) -> list[Message]:
    """A chat up to the last message that the assistant answers."""
    end = len(chat)
    while end and chat[end - 1]["role"] == "assistant":
        end -= 1
    return chat[:end]
