"""Bodies that vLLM stumbles over while it reads them: valid by its own schema, told as 500, a client's to change.

Known of vLLM 0.32: the history of a `/v1/responses` request with an answer of the assistant that has no content, or
that is a refusal (`item.content[0].text`). Only errors from the modules that turn a body into a conversation are taken;
everything else stays the 500 that it is.
"""

from __future__ import annotations

import logging
import traceback
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

_READERS = frozenset({"vllm.entrypoints.openai.responses.utils"})
_STUMBLES = (AttributeError, IndexError, KeyError)

logger = logging.getLogger(__name__)


def tell_misread(api: Any) -> None:
    """Have the engine's application (a FastAPI or Starlette) answer them with 400."""
    for kind in _STUMBLES:
        api.add_exception_handler(kind, _answer)
    api.middleware_stack = (
        None  # vLLM has built it already, with the handlers of that moment; the first call does again
    )


async def _answer(_: Request, error: Exception) -> JSONResponse:
    if _raised_in(error) not in _READERS:
        raise error
    logger.warning("vLLM could not read a request", exc_info=error)
    told = f"The engine can't read this request; is there a message without text in it? ({error})"
    return JSONResponse(
        {"error": {"message": told, "type": "BadRequestError", "param": None, "code": 400}}, status_code=400
    )


def _raised_in(error: Exception) -> str:
    """The module that asked for what isn't there; a missing attribute is told by pydantic in its name."""
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return next((module for module in reversed(modules) if not module.startswith("pydantic")), "")
