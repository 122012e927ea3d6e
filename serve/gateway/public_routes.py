"""Which of the engine's routes are public, and the answers the gateway gives itself, in OpenAI's shapes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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

_NO = frozenset({b"null", b"false"})


def wants_prompt_logprobs(fields: Mapping[str, Any]) -> bool:
    """Whether a request, its top level as JSON by field, asks for log-probabilities of its own prompt.

    Where vLLM 0.32 has adapters it computes them with the batch's sampling positions: on a CPU any second request in
    the batch stops the engine, on a GPU an adapter of the output layer is left out
    (https://github.com/vllm-project/vllm/issues/16668, https://github.com/vllm-project/vllm/issues/51594).
    """
    said = {name: bytes(fields.get(name, b"null")) for name in ("prompt_logprobs", "echo", "logprobs", "top_logprobs")}
    # vLLM gives a chat that shall be repeated as many as `top_logprobs` says, and that is 0 where nothing is said; to
    # it 0 of them, or `false`, is a number.
    counts = "messages" in fields or {said["logprobs"], said["top_logprobs"]} != {b"null"}
    return said["prompt_logprobs"] != b"null" or (said["echo"] not in _NO and counts)


def error_response(error: ServeError, path: str = "") -> JSONResponse:
    """The answer in the shape that clients of `path` read."""
    retry = {"retry-after": str(error.retry_after_s)} if error.retry_after_s else {}
    body = anthropic_body(error) if is_anthropic(path) else error.body()
    return JSONResponse(body, status_code=error.status, headers={**error.headers, **retry})


def is_anthropic(path: str) -> bool:
    return path.startswith("/v1/messages")


def anthropic_body(error: ServeError) -> dict[str, Any]:
    """Anthropic's shape, with Graft's own code beside it."""
    kind = _ANTHROPIC_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": str(error), "code": error.code}}


def model_card(name: str, root: str, parent: str | None, created: int) -> dict[str, Any]:
    """One model as GET /v1/models lists it, with the fields vLLM adds: root, what it stands for (vLLM tells the
    path there, which is nobody's business); parent, the base model of an adapter."""
    return {
        "id": name, "object": "model", "created": created, "owned_by": "graft", "root": root, "parent": parent,
        "permission": [],
    }  # fmt: skip


def model_list(cards: Iterable[dict[str, Any]]) -> dict[str, Any]:
    return {"object": "list", "data": list(cards)}
