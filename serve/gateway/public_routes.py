"""The allow-list of the engine's routes, and the gateway's own responses in the shapes of OpenAI and Anthropic."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

from serve.errors import ServeError

# Everything else that the engine's application offers (load_lora_adapter, profile, sleep, scale_elastic_ep,
# invocations, metrics, …) is unreachable: an allow-list stays closed when a new engine version adds a route.
ENGINE_ROUTES: tuple[str, ...] = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/embeddings",
    "/tokenize",
    "/detokenize",
)

_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def error_response(error: ServeError, path: str = "") -> JSONResponse:
    """The error in the shape that clients of `path` expect."""
    retry = {"retry-after": str(error.retry_after_s)} if error.retry_after_s else {}
    body = anthropic_body(error) if is_anthropic(path) else error.body()
    return JSONResponse(body, status_code=error.status, headers={**error.headers, **retry})


def error_event(error: ServeError, path: str, number: int) -> bytes:
    """The error as the last event of a stream of `path` that has begun; `number`: of the event, for `/v1/responses`."""
    if is_anthropic(path):
        return _event(anthropic_body(error), "error")
    if path == "/v1/responses":
        own = {"type": "error", "code": error.code, "message": str(error), "param": error.param}
        return _event({**own, "sequence_number": number}, "error")
    return _event(error.body()) + b"data: [DONE]\n\n"


def _event(content: Mapping[str, Any], kind: str = "") -> bytes:
    head = f"event: {kind}\n" if kind else ""
    return f"{head}data: {json.dumps(content)}\n\n".encode()


def is_anthropic(path: str) -> bool:
    return path.startswith("/v1/messages")


def anthropic_body(error: ServeError) -> dict[str, Any]:
    """An error in Anthropic's shape, with Graft's own code besides."""
    kind = _ANTHROPIC_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": str(error), "code": error.code}}
