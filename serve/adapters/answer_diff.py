"""Compares two answers to one request: the one of a shadow with the one that the caller got."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

_WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class Comparison:
    same: bool  # the texts are equal
    agreeing_words: int  # from the beginning to the first difference
    words: int  # of the longer answer


def compare(answer: str, shadow_answer: str) -> Comparison:
    words, shadow_words = _WORD.findall(answer), _WORD.findall(shadow_answer)
    pairs = zip(words, shadow_words, strict=False)
    agreeing_words = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return Comparison(answer == shadow_answer, agreeing_words, max(len(words), len(shadow_words)))


def text_of(body: bytes) -> str | None:
    """The text in the body of a completion, streamed or not; None if the body has no text."""
    try:
        texts = [_text_of_event(json.loads(event)) for event in _events(body)]
    except ValueError:
        return None
    known_texts = [text for text in texts if text is not None]
    return "".join(known_texts) if known_texts else None


def _events(body: bytes) -> list[bytes]:
    """The JSON documents of a body: the data of server-sent events, or the whole body."""
    if not body.startswith((b"data:", b"event:", b":")):
        return [body]
    data = (line[5:].strip() for line in body.splitlines() if line.startswith(b"data:"))
    return [document for document in data if document != b"[DONE]"]


def _text_of_event(event: Any) -> str | None:
    """The text of a whole answer or of one chunk: all OpenAI `choices` in their order."""
    choices = event.get("choices") if isinstance(event, dict) else None
    if not isinstance(choices, list) or not choices:
        return None
    texts = []
    for choice in choices:
        message = choice.get("message") or choice.get("delta") or {}
        texts.append(choice.get("text") or message.get("content") or "")
    return "".join(texts)
