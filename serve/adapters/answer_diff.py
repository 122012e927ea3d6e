"""Two answers to one request, compared: what a shadow said against what the caller was told."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

_WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class Comparison:
    same: bool  # the very same text
    agreeing_words: int  # from the beginning, before they part
    words: int  # of the longer one


def compare(told: str, shadowed: str) -> Comparison:
    one, other = _WORD.findall(told), _WORD.findall(shadowed)
    agreeing = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
    return Comparison(told == shadowed, agreeing, max(len(one), len(other)))


def text_of(body: bytes) -> str | None:
    """What a model said, from the body of a completion, streamed or not; None if there is no text in it."""
    try:
        pieces = [_said(json.loads(event)) for event in _events(body)]
    except ValueError:
        return None
    found = [piece for piece in pieces if piece is not None]
    return "".join(found) if found else None


def _events(body: bytes) -> list[bytes]:
    if not body.startswith((b"data:", b"event:", b":")):
        return [body]
    lines = (line[5:].strip() for line in body.splitlines() if line.startswith(b"data:"))
    return [line for line in lines if line != b"[DONE]"]


def _said(event: Any) -> str | None:
    """The text of a whole answer or of one chunk: OpenAI's choices only, all of them in order."""
    choices = event.get("choices") if isinstance(event, dict) else None
    if not isinstance(choices, list) or not choices:
        return None
    texts = []
    for choice in choices:
        message = choice.get("message") or choice.get("delta") or {}
        texts.append(choice.get("text") or message.get("content") or "")
    return "".join(texts)
