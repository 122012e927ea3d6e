"""What a request may use at most, read from its body before it runs; and the cap on its output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from serve.errors import InvalidBody, OutputTooLong

# How each route calls the number of tokens that may be generated. Where there are two, vLLM takes the first.
_OUTPUT_FIELDS = {
    "/v1/chat/completions": ("max_completion_tokens", "max_tokens"),
    "/v1/completions": ("max_tokens",),
    "/v1/responses": ("max_output_tokens",),
    "/v1/messages": ("max_tokens",),
}
# What no engine runs for.
_FREE = frozenset({"/tokenize", "/detokenize", "/v1/messages/count_tokens"})
# An estimate that text rarely exceeds: a token of prose is four bytes, of code three. What a chat template adds is the
# second number. Where it is too low, what was really used is entered afterwards.
_BYTES_PER_TOKEN = 2
_TEMPLATE_TOKENS = 64

_any = msgspec.json.Decoder()


@dataclass(frozen=True)
class Demand:
    """`tokens`: about the most that it will use, prompt and completion. `added`: fields that the body needs, because
    the caller named no limit of its output."""

    tokens: int
    added: dict[str, Any]


NO_DEMAND = Demand(0, {})


def demand_of(
    path: str, fields: dict[str, Any], size_bytes: int, context_tokens: int, max_output: int | None, budget: int | None
) -> Demand:
    """`max_output`: of one sequence; `budget`: all tokens of the request, which its output must stay within unless
    its caller asks for a number. Raises OutputTooLong or InvalidBody."""
    if path in _FREE:
        return NO_DEMAND
    prompt = min(context_tokens, size_bytes // _BYTES_PER_TOKEN + _TEMPLATE_TOKENS)
    names = _OUTPUT_FIELDS.get(path, ())
    if not names:
        return Demand(prompt, {})
    prompts, each = _prompts(path, fields), _sequences(fields)
    asked = {name: number for name in names if (number := _number(fields, name)) is not None}
    for name, number in asked.items():
        if max_output is not None and number > max_output:
            raise OutputTooLong(name, number, max_output)
    if asked:
        return Demand(prompt + prompts * each * min(context_tokens, max(asked.values())), {})
    room = context_tokens if budget is None else max(1, (budget - prompt) // (prompts * each))
    output = min(context_tokens, room, max_output or context_tokens)
    capped = output < context_tokens
    return Demand(prompt + prompts * each * output, {names[0]: output} if capped else {})


def _prompts(path: str, fields: dict[str, Any]) -> int:
    """Completions take several prompts at once: texts, or lists of tokens."""
    if path != "/v1/completions" or "prompt" not in fields:
        return 1
    prompt = _any.decode(fields["prompt"])
    several = isinstance(prompt, list) and prompt and not isinstance(prompt[0], int)
    return len(prompt) if several else 1


def _sequences(fields: dict[str, Any]) -> int:
    return max(1, *(_number(fields, name) or 1 for name in ("n", "best_of")))


def _number(fields: dict[str, Any], name: str) -> int | None:
    """vLLM would take "16" and 16.0 as well; what is no number at all it would refuse."""
    value = _any.decode(fields[name]) if name in fields else None
    if value is None:
        return None
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        raise InvalidBody(f"`{name}` must be a whole number.") from None
