"""golden.json: what a server of the artifact is compared with, collected while it was measured."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from convert.artifact import Golden, GoldenChat, GoldenPrompt
from convert.errors import TextUnreadable
from convert.quality.examine import Examination
from convert.quality.reference import Reference
from convert.quality.rows import Rows
from convert.quality.text import Message
from convert.quality.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

_CHATS = 4
_DECIMALS = 6
# For a text without chats.
_OWN_CHATS: tuple[list[Message], ...] = (
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "user", "content": "Hello! My name is Ada."},
        {"role": "assistant", "content": "Hello, Ada. What can I do for you?"},
        {"role": "user", "content": "Tell me what my name is, in “quotes”.\n\nThank you."},
    ],
)


def golden(expected: Reference, found: Examination, model: Path, *, separate: bool) -> Golden:
    """The golden answers of a measured result. `model`: its directory; `separate`: its adapter stays separate.

    32 prompts of at most 48 tokens (fewer where the text has no more), spread over the measured rows or cut from them;
    chats of the text, of the canaries and two of our own, none where the model has no chat template. Templates that
    write a date are given `tokenizer.CHAT_SETTINGS`, and so must a server be that is compared.
    """
    tokenizer = Tokenizer.open(model)
    results = (expected.own, found.own, expected.base if separate else None)
    return Golden(
        prompts=tuple(_prompts(expected.rows, *results)),
        chats=tuple(_chats(tokenizer, expected)) if tokenizer.has_template else (),
        canaries=tuple(canary.golden for canary in expected.canaries),
        stop_token_ids=tokenizer.stop_ids,
    )


def golden_bytes(golden: Golden) -> bytes:
    """The file's content: the same for the same golden answers."""
    document = golden.model_dump(mode="json")
    return (json.dumps(document, ensure_ascii=False, separators=(",", ":"), allow_nan=False) + "\n").encode()


def write_golden(path: Path, golden: Golden) -> str:
    """Write the file, durable when this returns; its SHA-256."""
    content = golden_bytes(golden)
    with path.open("xb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    return hashlib.sha256(content).hexdigest()


def _prompts(
    rows: Rows,
    reference: Sequence[torch.Tensor],
    result: Sequence[torch.Tensor],
    base: Sequence[torch.Tensor] | None,
) -> Iterator[GoldenPrompt]:
    for place in (*rows.heads, *range(len(rows.measured), len(rows.all))):
        ids = rows.all[place][0, : rows.prompt_tokens].tolist()

        def rounded(values: Sequence[torch.Tensor], place: int = place, count: int = len(ids) - 1) -> tuple[float, ...]:
            # + 0.0 makes -0.0 the same as 0.0
            return tuple(round(value, _DECIMALS) + 0.0 for value in values[place][:count].tolist())

        yield GoldenPrompt(
            token_ids=tuple(ids),
            reference=rounded(reference),
            result=rounded(result),
            base=rounded(base) if base else None,
        )


def _chats(tokenizer: Tokenizer, expected: Reference) -> Iterator[GoldenChat]:
    told = [_question(chat) for chat in expected.text.chats]
    asked = [chat for chat in told if chat][:_CHATS] + [list(canary.messages) for canary in expected.canaries]
    unique = {json.dumps(chat): chat for chat in (*asked, *_OWN_CHATS)}
    for chat in unique.values():
        try:
            rendered = tokenizer.render(chat, prompt=True)
        except TextUnreadable:  # a template may refuse a form of chat that the user never has
            if chat in _OWN_CHATS:
                continue
            raise
        yield GoldenChat(messages=tuple(chat), rendered=rendered)


def _question(chat: list[Message]) -> list[Message]:
    """A chat up to the last message that the assistant answers."""
    end = len(chat)
    while end and chat[end - 1]["role"] == "assistant":
        end -= 1
    return chat[:end]
