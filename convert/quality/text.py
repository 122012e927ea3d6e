"""Held-out rows: JSON lines of plain text or chats."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.errors import TextUnreadable

DEFAULT_TEXT = Path(__file__).parents[1] / "held_out.jsonl"

Message = dict[str, str]
Row = str | list[Message]

_FORM = '{"text": "…"} or {"messages": [{"role": "user", "content": "…"}, …]}'


@dataclass(frozen=True)
class Text:
    """Held-out rows: plain text, or chats."""

    name: str
    rows: tuple[Row, ...]

    @classmethod
    def open(cls, path: Path | None) -> Text:
        """Read a JSON lines file of {"text": …} and {"messages": […]}; None: the default. Raises TextUnreadable."""
        rows = tuple(_row(document, where) for where, document in json_lines(path or DEFAULT_TEXT, _FORM))
        return cls(path.name if path else "default", rows)

    @property
    def chats(self) -> tuple[list[Message], ...]:
        return tuple(row for row in self.rows if not isinstance(row, str))


def json_lines(path: Path, form: str) -> Iterator[tuple[str, Any]]:
    """Where a line is, for messages, and what it holds. Raises TextUnreadable, also when there are no lines."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as cause:
        raise TextUnreadable(f"{path} can't be read as UTF-8 text: {cause}") from None
    if not any(line.strip() for line in lines):
        raise TextUnreadable(f"{path} has no rows; expected lines like {form}")
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError):  # RecursionError: thousands of nested brackets
                raise TextUnreadable(f"{where}: not JSON; expected {form}") from None


def messages_of(document: Any) -> list[Message]:
    """The messages of a chat with role and content as text; empty when they have another form."""
    try:
        messages = [{"role": one["role"], "content": one["content"]} for one in document["messages"]]
    except (KeyError, TypeError):
        return []
    return messages if all(isinstance(value, str) for one in messages for value in one.values()) else []


def _row(document: Any, where: str) -> Row:
    if isinstance(document, dict) and isinstance(document.get("text"), str):
        return str(document["text"])
    if messages := messages_of(document):
        return messages
    raise TextUnreadable(f"{where}: expected {_FORM}, with text in every place")
