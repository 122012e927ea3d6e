"""The engine's errors as answers of the API: OpenAI's types and codes, the name of the field, and nothing internal."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from serve.errors import EngineError

_TOO_LONG = re.compile(r"maximum context length|longer than the maximum model length|exceeds the max_model_len")
# Names of vLLM for what several fields of a request may hold; the first field that the request has is the one.
_PROMPT_FIELDS = ("messages", "prompt", "input")
_GRAMMAR_FIELDS = ("response_format", "text", "structured_outputs", "tools")
GRAMMAR_FIELD = "grammar"  # Graft's own
_FIELDS = {
    **dict.fromkeys(("input_text", "input_tokens", "prompt", "input"), _PROMPT_FIELDS),
    GRAMMAR_FIELD: _GRAMMAR_FIELDS,
}
# Every code of an EngineError that no other error of serve.errors has.
ENGINE_CODES = frozenset({
    "context_length_exceeded", "missing_required_parameter", "invalid_type", "invalid_value", "invalid_request",
    "not_found", "not_implemented", "grammar_too_large", "grammar_too_costly",
})  # fmt: skip
_CODES = {404: "not_found", 501: "not_implemented", 503: "engine_unavailable"}

# What Python itself says of a value of the wrong type, which vLLM passes on as if it were for the client.
_OF_PYTHON = re.compile(
    r"NoneType|'[\w.]+' object |\bobject is not\b|has no attribute|unexpected keyword|positional argument"
    r"|indices must be|unsupported operand|not supported between|unhashable type|has no len\(\)|values? to unpack"
    r"|can only concatenate|must be real number|invalid literal for|could not convert|update sequence element"
    r"|__\w+__|\b\w+\(\) (takes|got|missing|argument)"
)
_UNREADABLE = "The engine can't read this request: a field is null, or has another type than described."
_INTERNAL = "The engine had an error while processing the request."

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineFault:
    """An error of the engine, as its API describes it; `error` has `message` and perhaps `param` and `code`."""

    status: int
    error: Mapping[str, Any]


def engine_error(fault: EngineFault, fields: Collection[str]) -> EngineError:
    """The answer to a request that has these `fields`."""
    if fault.status >= 500:
        logger.error("the engine answered %d: %s", fault.status, fault.error.get("message"))
    status = fault.status
    message, param, code = (fault.error.get(name) for name in ("message", "param", "code"))
    text = str(message or "The engine gave no reason.")
    if status < 500 and _TOO_LONG.search(text):
        return EngineError(status, text, _field("input_text", fields), "context_length_exceeded")
    if status < 500 and _OF_PYTHON.search(text):
        logger.warning("the engine answered %d: %s", status, text)
        text = f"Invalid '{param}'. {_UNREADABLE}" if isinstance(param, str) and param else _UNREADABLE
    if text.startswith("Grammar error"):
        param = GRAMMAR_FIELD
    param = _field(param, fields) if isinstance(param, str) else None
    if not isinstance(code, str):  # vLLM's code is the status
        code = "server_error" if status == 500 else _CODES.get(status, "invalid_value" if param else "invalid_request")
    return EngineError(status, text if status != 500 else _INTERNAL, param, code)


def fault_of(status: int, body: bytes) -> EngineFault:
    """What a response of the engine's API says: in OpenAI's form, in Anthropic's, or in FastAPI's."""
    try:
        content: Any = json.loads(body)
    except ValueError:
        content = None
    error = content.get("error", {"message": content.get("detail")}) if isinstance(content, dict) else {}
    return EngineFault(status, error if isinstance(error, Mapping) else {"message": str(error)})


def _field(name: str, fields: Collection[str]) -> str:
    """The request's own name of a field."""
    top, _, rest = name.partition(".")
    own = top if top in fields else next((field for field in _FIELDS.get(top, ()) if field in fields), top)
    return f"{own}.{rest}" if rest else own
