"""Held-out rows: JSON lines of plain text or chats."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.errors import TextUnreadable
from convert.inputs.chat.tokenizer import Message, Row

DEFAULT_TEXT = Path(__file__).with_name("held_out.jsonl")

_EXPECTED = '{"text": "…"} or {"messages": [{"role": "user", "content": "…"}, …]}'


@dataclass(frozen=True)
class Text:
    """Held-out rows: plain text, or chats."""

    name: str
    rows: tuple[Row, ...]

    @classmethod
    def open(cls, path: Path | None) -> Text:
        """Read a JSON lines file of {"text": …} and {"messages": […]}; None: the default. Raises TextUnreadable."""
        rows = tuple(_row(document, where) for where, document in json_lines(path or DEFAULT_TEXT, _EXPECTED))
        return cls(path.name if path else "default", rows)

    @property
    def chats(self) -> tuple[list[Message], ...]:
        return tuple(row for row in self.rows if not isinstance(row, str))


def json_lines(path: Path, expected: str) -> Iterator[tuple[str, Any]]:
    """Each line's position, for messages, and its document. `expected`: an example of a line, for messages.

    Raises TextUnreadable, also where there are no lines.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as cause:
        raise TextUnreadable(f"{path} can't be read as UTF-8 text: {cause}") from None
    if not any(line.strip() for line in lines):
        raise TextUnreadable(f"{path} has no rows; expected lines like {expected}")
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                document = json.loads(line)
                # JSON can escape half of a UTF-16 pair, which is no text: no tokenizer takes it.
                json.dumps(document, ensure_ascii=False).encode()
            except (ValueError, RecursionError):  # RecursionError: thousands of nested brackets
                raise TextUnreadable(f"{where}: not JSON of valid text; expected {expected}") from None
            yield where, document


def messages_of(document: Any) -> list[Message]:
    """The messages of a chat with role and content as text; empty where they have another form."""
    try:
        messages = [{"role": message["role"], "content": message["content"]} for message in document["messages"]]
    except (KeyError, TypeError):
        return []
    return messages if all(isinstance(value, str) for message in messages for value in message.values()) else []


def _row(document: Any, where: str) -> Row:
    if isinstance(document, dict) and isinstance(document.get("text"), str):
        return str(document["text"])
    if messages := messages_of(document):
        return messages
    raise TextUnreadable(f"{where}: expected {_EXPECTED}, with text in every place")
