"""The most tokens that a request may use, read from its body before it runs; and the limit that caps its output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
from pydantic import TypeAdapter, ValidationError

from serve.errors import InvalidBody, OutputTooLong

_COMPLETIONS = "/v1/completions"
# The fields of each route that limit the output. If a body has both of two, vLLM uses the first.
_OUTPUT_FIELDS = {
    "/v1/chat/completions": ("max_completion_tokens", "max_tokens"),
    _COMPLETIONS: ("max_tokens",),
    "/v1/responses": ("max_output_tokens",),
    "/v1/messages": ("max_tokens",),
}
# Routes on which a request may ask for several answers. Elsewhere vLLM ignores `n`, and `best_of` everywhere.
_SEVERAL_ANSWERS = frozenset({"/v1/chat/completions", _COMPLETIONS})
# Routes that do not run the engine.
_FREE = frozenset({"/tokenize", "/detokenize", "/v1/messages/count_tokens"})

_integer = TypeAdapter(int | None)  # vLLM declares its fields so; it accepts "16", 16.0 and true, too
_list = msgspec.json.Decoder(list[msgspec.Raw])


@dataclass(frozen=True)
class TokenLimits:
    """The limits of the tokens of a request."""

    context_tokens: int  # of the engine
    max_output_tokens: int | None = None  # per sequence; a caller that asks for more is refused
    budget_tokens: int | None = None  # of the whole request: the smallest token limit of the caller's key


@dataclass(frozen=True)
class TokenReservation:
    """`tokens`: an estimate of the most that a request may use, prompt and output. `added`: fields to add to its body,
    which limit its output where the caller did not."""

    tokens: int
    added: dict[str, Any]

    @classmethod
    def for_request(
        cls, path: str, fields: dict[str, Any], prompt_tokens: int, limits: TokenLimits
    ) -> TokenReservation:
        """`fields`: of the body, undecoded; `prompt_tokens`: an estimate. Raises OutputTooLong or InvalidBody."""
        if path in _FREE:
            return NO_RESERVATION
        output_fields = _OUTPUT_FIELDS.get(path)
        if output_fields is None:
            return cls(prompt_tokens, {})
        prompts = _prompts(path, fields)
        prompt_tokens = min(prompts * limits.context_tokens, prompt_tokens)
        sequences = prompts * _answers_per_prompt(path, fields)
        requested = _requested_output(path, fields, limits.max_output_tokens)
        if requested is not None:
            return cls(prompt_tokens + sequences * min(limits.context_tokens, requested), {})
        output_tokens = _default_output(limits, prompt_tokens, sequences)
        added = {output_fields[0]: output_tokens} if output_tokens < limits.context_tokens else {}
        return cls(prompt_tokens + sequences * output_tokens, added)


NO_RESERVATION = TokenReservation(0, {})


def _prompts(path: str, fields: dict[str, Any]) -> int:
    """How many prompts a body has. Only completions take several: a list of texts, or of lists of token ids."""
    if path != _COMPLETIONS or bytes(fields.get("prompt", b""))[:1] != b"[":
        return 1
    items = _list.decode(fields["prompt"])
    is_batch = items and bytes(items[0])[:1] in (b'"', b"[")
    return len(items) if is_batch else 1


def _answers_per_prompt(path: str, fields: dict[str, Any]) -> int:
    answers = _integer_field(fields, "n") if path in _SEVERAL_ANSWERS else None
    if answers is None:
        return 1
    if answers < 1:
        raise _not_a_number_from("n", 1)
    return answers


def _requested_output(path: str, fields: dict[str, Any], max_output_tokens: int | None) -> int | None:
    """The largest output per sequence that the body asks for, at least one token; None if it names none."""
    names = _OUTPUT_FIELDS[path]
    requested = {name: number for name in names if (number := _integer_field(fields, name)) is not None}
    for name, number in requested.items():
        if max_output_tokens is not None and number > max_output_tokens:
            raise OutputTooLong(name, number, max_output_tokens)
    if not requested:
        return None
    # For 0, a completion with `echo` answers with its prompt; the engine generates a token for it.
    least = 0 if path == _COMPLETIONS else 1
    name, largest = max(requested.items(), key=lambda item: item[1])
    if largest < least:
        raise _not_a_number_from(name, least)
    return max(1, largest)


def _default_output(limits: TokenLimits, prompt_tokens: int, sequences: int) -> int:
    """The output per sequence of a request that names none. It is at least one token even if the budget is spent on the
    prompt: then the caller's limit refuses the request."""
    output_tokens = min(limits.context_tokens, limits.max_output_tokens or limits.context_tokens)
    if limits.budget_tokens is None:
        return output_tokens
    return min(output_tokens, max(1, (limits.budget_tokens - prompt_tokens) // sequences))


def _integer_field(fields: dict[str, Any], name: str) -> int | None:
    """A field of the body; None if it is absent or null. Raises InvalidBody for what vLLM refuses as an integer."""
    if name not in fields:
        return None
    try:
        return _integer.validate_json(bytes(fields[name]))
    except ValidationError:
        raise InvalidBody(f"`{name}` must be a whole number.", name) from None


def _not_a_number_from(name: str, least: int) -> InvalidBody:
    return InvalidBody(f"`{name}` must be a whole number of at least {least}.", name)
