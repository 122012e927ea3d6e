"""Errors that a running server answers requests with; each knows its HTTP status, code and headers."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Mapping

_NAMED_MODELS = 20


class ServeError(Exception):
    """A response in OpenAI's error shape: {"error": {"message", "type", "param", "code"}}."""

    status = 500
    type = "server_error"
    code = "server_error"
    param: str | None = None
    retry_after_s: int | None = None
    headers: Mapping[str, str] = {}  # of the response, besides Retry-After

    def body(self) -> dict[str, dict[str, str | None]]:
        return {"error": {"message": str(self), "type": self.type, "param": self.param, "code": self.code}}


class RunTooLong(ServeError):
    """The official clients of OpenAI and Anthropic obey the header: a retry would run as long."""

    status, type, code = 504, "timeout", "run_too_long"
    headers = {"x-should-retry": "false"}  # noqa: RUF012  (never changed)

    def __init__(self, limit_s: float) -> None:
        super().__init__(f"The request ran for {limit_s:g} s, which is the limit here. Ask for less output at once.")


class HolderTimeout(ServeError):
    """Unlike a run that took too long, a retry reaches another replica, or this one once it has been replaced."""

    status, type, code = 504, "timeout", "holder_timeout"

    def __init__(self, limit_s: float) -> None:
        super().__init__(
            f"The replica that this request was forwarded to sent nothing for {limit_s:g} s, which is longer than a "
            "request may take there; try again."
        )


class EngineError(ServeError):
    """An error of the engine. The codes follow OpenAI's."""

    def __init__(self, status: int, message: str, param: str | None, code: str) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        if status < 500:
            self.type = InvalidRequest.type
        elif status == Unavailable.status:
            self.type, self.retry_after_s = Unavailable.type, Unavailable.retry_after_s


class InvalidRequest(ServeError):
    status, type = 400, "invalid_request_error"


class UnknownModel(InvalidRequest):
    status, code, param = 404, "model_not_found", "model"

    def __init__(self, model: str, known: Collection[str]) -> None:
        named = ", ".join(heapq.nsmallest(_NAMED_MODELS, known))
        hidden = f" and {len(known) - _NAMED_MODELS} more: see GET /v1/models" if len(known) > _NAMED_MODELS else ""
        super().__init__(f"The model `{model}` does not exist. Models here: {named}{hidden}.")


class ModelMissing(InvalidRequest):
    code, param = "model_missing", "model"

    def __init__(self) -> None:
        super().__init__("This server has several base models: say in `model` which one, see GET /v1/models.")


class UnknownRoute(InvalidRequest):
    status, code = 404, "route_not_found"

    def __init__(self, method: str, path: str) -> None:
        super().__init__(f"Unknown request URL: {method} {path}. The API is described in docs/reference/api.md.")


class MethodNotAllowed(InvalidRequest):
    status, code = 405, "method_not_allowed"

    def __init__(self, method: str, path: str, allowed: Collection[str]) -> None:
        methods = ", ".join(sorted(allowed))
        super().__init__(f"{path} takes {methods}, and not {method}.")
        self.headers = {"allow": methods}


class TaskUnsupported(InvalidRequest):
    """The kind of the served model can't answer this route. The status is 400 and not 501, because clients retry a 501,
    and no retry can succeed."""

    code, param = "task_unsupported", "model"

    def __init__(self, path: str) -> None:
        super().__init__(f"The model that is served here can't answer {path}: it generates text.")


class ToolUnsupported(InvalidRequest):
    code = "tool_unsupported"

    def __init__(self, kind: str, index: int) -> None:
        super().__init__(
            f"Tools of the type `{kind[:64]}` are not available here: this server runs no tools. Give a `function`, "
            "and run it where you call from."
        )
        self.param = f"tools[{index}].type"


class InvalidBody(InvalidRequest):
    code = "invalid_body"

    def __init__(self, message: str, field: str | None = None) -> None:
        """`field`: the one that is wrong, where one is."""
        super().__init__(message)
        self.param = field


class PromptLogprobsUnavailable(InvalidRequest):
    code = "prompt_logprobs_unavailable"

    def __init__(self) -> None:
        super().__init__(
            "Log-probabilities of the prompt (`prompt_logprobs`, `echo` with `logprobs`, `echo` of a chat) are not "
            "available from an engine that serves adapters. Those of generated tokens are; a merged model gives both."
        )


class BodyTooLarge(InvalidRequest):
    status, code = 413, "body_too_large"

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(f"The request body is larger than {limit_bytes} bytes; send less at once.")


class Unauthorized(InvalidRequest):
    status, code = 401, "invalid_admin_token"

    def __init__(self) -> None:
        super().__init__("The admin API needs `Authorization: Bearer TOKEN` with the token of this server.")


class InvalidApiKey(InvalidRequest):
    status, code = 401, "invalid_api_key"
    headers = {"www-authenticate": "Bearer"}  # noqa: RUF012  (never changed)

    def __init__(self, given: bool) -> None:
        super().__init__(
            "The API key is not known here, or it has expired."
            if given
            else "No API key was given: send it as `Authorization: Bearer KEY`, or as `x-api-key: KEY`."
        )


class BodyTooSlow(InvalidRequest):
    status, code = 408, "body_too_slow"
    headers = {"connection": "close"}  # noqa: RUF012  (never changed; the rest of the body is not waited for)

    def __init__(self, limit_s: float) -> None:
        super().__init__(f"The request body did not arrive within {limit_s:g} s.")


class OutputTooLong(InvalidRequest):
    code = "output_too_long"

    def __init__(self, field: str, asked: int, limit: int) -> None:
        super().__init__(f"`{field}` is {asked}; one request gets at most {limit} tokens here.")
        self.param = field


class PathRefused(InvalidRequest):
    status, code = 403, "path_refused"


class PoolRefused(InvalidRequest):
    status, code = 409, "pool_refused"


class AdapterRejected(InvalidRequest):
    status, code = 422, "adapter_rejected"


class TransitionRefused(InvalidRequest):
    status, code = 409, "transition_refused"


class PublishFailed(InvalidRequest):
    status, code = 409, "publish_failed"


class SplitRefused(InvalidRequest):
    status, code = 409, "split_refused"


class PublishUnconfirmed(ServeError):
    status, code = 504, "publish_unconfirmed"


class Unavailable(ServeError):
    status, type, retry_after_s = 503, "service_unavailable", 1


class CallerQueueFull(ServeError):
    status, type, code = 429, "rate_limit_error", "caller_queue_full"

    def __init__(self, limit: int, retry_after_s: int) -> None:
        super().__init__(f"{limit} requests of this caller wait already; send fewer at once, or try again later.")
        self.retry_after_s = retry_after_s


class RateLimited(ServeError):
    """The request exceeds a limit of the caller's key. `kind` is the `type` that OpenAI's API gives such an error.
    `retry_after_s` is None where the time is unknown or waiting would not help."""

    status, code = 429, "rate_limit_exceeded"

    def __init__(self, message: str, kind: str, retry_after_s: int | None, headers: Mapping[str, str]) -> None:
        super().__init__(message)
        self.type = kind
        self.retry_after_s = retry_after_s
        self.headers = headers
