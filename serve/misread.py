"""Bodies that vLLM stumbles over: valid by its own schema, told as 500, a client's to change.

Known of vLLM 0.32, each found by fuzzing:

- the history of a `/v1/responses` request with an answer of the assistant that has no content, or that is a refusal
  (`item.content[0].text`), a part of a message that is no object (`assert isinstance(part, dict)`): taken if the error
  comes from a module that turns a body into a conversation;
- a field that its checks of a body take for another type before they look at it (`structured_outputs: [{}]`);
- a number that its message to the engine core can't hold, as one of more than 64 bits deep in a body.

Everything else stays the 500 that it is.
"""

from __future__ import annotations

import logging
import traceback
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

_READERS = frozenset({"vllm.entrypoints.openai.responses.utils", "vllm.renderers.chat_utils"})
_STUMBLES = (AssertionError, AttributeError, IndexError, KeyError)

logger = logging.getLogger(__name__)


def tell_misread(api: Any, failed: type[Exception]) -> None:
    """Have the engine's application (a FastAPI or Starlette) answer them with 400. `failed` is what it raises, from
    the cause, where the engine didn't take a request."""
    handlers = api.exception_handlers
    usual = next(handlers[it] for it in failed.__mro__ if it in handlers)

    async def answer_failed(request: Request, error: Exception) -> Response:
        if (number := _too_large(error)) is None:
            response: Response = await usual(request, error)
            return response
        return _bad_request(f"A number in this request is too large for the engine: {number}.")

    for kind in _STUMBLES:
        api.add_exception_handler(kind, _answer_stumble)
    api.add_exception_handler(failed, answer_failed)
    api.middleware_stack = None  # vLLM has built it already, with the handlers of that moment


def tell_misread_in(router: Any) -> None:
    """The same for numbers in vLLM's module of Anthropic's routes, which turns every exception into an answer itself,
    by its `create_error_response`."""
    usual = router.create_error_response

    def create_error_response(error: Exception) -> Any:
        return usual(_too_large(error) or error)

    router.create_error_response = create_error_response


def _too_large(error: Exception) -> OverflowError | None:
    """What kept the engine from being sent a request, if that is a number."""
    return error.__cause__ if isinstance(error.__cause__, OverflowError) else None


async def _answer_stumble(_: Request, error: Exception) -> Response:
    if not _reads(_raised_in(error)):
        raise error
    logger.warning("vLLM could not read a request", exc_info=error)
    reason = f" ({error})" if str(error) else ""
    return _bad_request(
        f"The engine can't read this request: a message without text, or with a part that is no object?{reason}"
    )


def _reads(module: str) -> bool:
    """Whether all that it does is to make a request of a body."""
    return module in _READERS or (module.startswith("vllm.entrypoints.") and module.endswith(".protocol"))


def _bad_request(message: str) -> JSONResponse:
    """As vLLM tells one."""
    error = {"message": message, "type": "BadRequestError", "param": None, "code": 400}
    return JSONResponse({"error": error}, status_code=400)


def _raised_in(error: Exception) -> str:
    """The module that asked for what isn't there; a missing attribute is told by pydantic in its name."""
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return next((module for module in reversed(modules) if not module.startswith("pydantic")), "")
