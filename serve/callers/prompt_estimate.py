"""Estimates how many tokens a prompt has from the size of its text, before the engine has read it."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

from serve.engine.prompt_size import PromptSize

_MAX_CALLERS = 10_000  # the density of the text of those that came last is remembered
_FORGETTING = 0.1  # of the difference, with each request whose text is less dense

# Routes whose prompt is made without a chat template.
_PLAIN = frozenset({"/v1/completions", "/v1/embeddings"})
_BEGIN_TOKENS = 1  # many tokenizers begin such a prompt with a token of its own


def text_bytes(fields: dict[str, Any]) -> int:
    """The bytes of those fields of a body, undecoded, from which a prompt is made: texts, lists and objects."""
    return sum(
        len(view) for name, value in fields.items() if name != "model" and _holds_text(view := memoryview(value))
    )


def _holds_text(value: memoryview) -> bool:
    return value[0] in b'"[{'


class PromptEstimator:
    """Estimates with the tokens per byte that the engine has measured; with more for a caller whose own texts had more,
    as texts in another script or lists of numbers have."""

    def __init__(self, size: PromptSize) -> None:
        self._size = size
        self._tokens_per_byte: OrderedDict[str, float] = OrderedDict()  # by caller, the one that came last at the end

    def estimate(self, caller: str, path: str, size_bytes: int) -> int:
        """The tokens of a prompt whose text has this size."""
        tokens_per_byte = max(self._size.tokens_per_byte, self._tokens_per_byte.get(caller, 0.0))
        return math.ceil(size_bytes * tokens_per_byte) + self._template_tokens(path)

    def observe(self, caller: str, path: str, size_bytes: int, prompt_tokens: int) -> None:
        """The prompt of a text of this size had so many tokens. A denser text counts at once for the caller's next
        requests, and is forgotten slowly."""
        observed = min(1.0, max(0, prompt_tokens - self._template_tokens(path)) / max(1, size_bytes))
        known = self._tokens_per_byte.pop(caller, 0.0)
        self._tokens_per_byte[caller] = max(observed, known + _FORGETTING * (observed - known))
        if len(self._tokens_per_byte) > _MAX_CALLERS:
            self._tokens_per_byte.popitem(last=False)

    def _template_tokens(self, path: str) -> int:
        return _BEGIN_TOKENS if path in _PLAIN else self._size.template_tokens
