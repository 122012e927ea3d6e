"""Everything that Graft changes in FastAPI, Starlette and pydantic, inside the engine's application.

Every function raises EngineStartFailed where it finds nothing to change. `CONTRACT` lists the names that are not part
of these libraries' documented API, or that the functions can't do without; tests/contracts/test_fastapi.py compares it
with the installed versions.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from importlib import metadata
from itertools import takewhile
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic_core import ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from convert.artifact import reason_of
from serve.engine.body_validator import BodyValidator
from serve.errors import EngineStartFailed

# In the notation of tests/contracts/contract.py.
CONTRACT: Mapping[str, tuple[str, ...]] = {
    "fastapi:FastAPI": ("routes",),
    "fastapi.exceptions:RequestValidationError": ("body",),
    "fastapi.routing:APIRoute": ("body_field",),
    "fastapi._compat.v2:ModelField": ("_type_adapter",),
    "fastapi._compat.v2:uses self._type_adapter.validate_python": (),
    "pydantic.type_adapter:TypeAdapter": ("core_schema", "validator", "_config"),
    "pydantic.type_adapter:uses self.validator.validate_python": (),
    "pydantic_core._pydantic_core:SchemaValidator.__init__": ("schema", "config", "/", "_use_prebuilt"),
    "pydantic_core.core_schema:ListSchema": ("fail_fast",),
    "pydantic_core.core_schema:TupleSchema": ("fail_fast",),
    "pydantic_core.core_schema:SetSchema": ("fail_fast",),
    "pydantic_core.core_schema:FrozenSetSchema": ("fail_fast",),
    "pydantic_core.core_schema:DictSchema": ("keys_schema",),
    "starlette.applications:Starlette": ("exception_handlers", "middleware_stack", "user_middleware"),
    "starlette.applications:Starlette.build_middleware_stack": (),
    "starlette.middleware:Middleware": ("cls",),
}

ExceptionHandler = Callable[[Request, Any], Awaitable[Response]]

_MAX_REASONS = 5
_MAX_MESSAGE_CHARACTERS, _MAX_PARAM_CHARACTERS = 1000, 200


def validate_fail_fast(api: Any) -> None:
    """Makes the validation of request bodies stop at the first invalid item of a list, for every route of a FastAPI,
    and name the field that is wrong in a body which the models' own validators can't read.

    pydantic reports every invalid item of a body. One invalid item of `input` of `/v1/responses` gives some thirty
    errors, one for each kind of message that it might have been, and takes 190 kB of memory: a body of a megabyte would
    take all memory of the machine. pydantic can stop at the first invalid item of a list, but not at the first invalid
    field of a model, so objects get a limit of keys instead.
    """
    fields = [field for route in api.routes if (field := getattr(route, "body_field", None))]
    if not fields:
        raise not_found("fastapi", "a route with a request body", "validation can't stop at the first invalid item")
    for field in fields:
        adapter = field._type_adapter
        adapter.validator = BodyValidator(adapter.core_schema, adapter._config)


def describe_invalid_bodies(api: Any) -> None:
    """Answers an invalid body with one error in OpenAI's form, which names the field and repeats nothing of the body.
    Some bodies are found invalid only when a handler reads a part of them: those errors have no path from the body's
    top."""

    async def answer(_: Request, error: Any) -> Response:
        described = described_error(error.errors(), getattr(error, "body", None))
        return JSONResponse({"error": described}, status_code=400)

    set_exception_handlers(api, {RequestValidationError: answer, ValidationError: answer})


def described_error(errors: Sequence[Any], body: Any = None) -> dict[str, Any]:
    """The fields of an error in OpenAI's form, from pydantic's or FastAPI's list of what is wrong with `body`. A field
    that may be of several types has an error for each of them."""
    structured = [error for error in errors if isinstance(error, Mapping)]
    if not structured:  # FastAPI's list may have plain texts
        message, param, code = "; ".join(map(str, errors)), "", "invalid_body"
    else:
        structured, paths = _of_what_is_there(structured, [_path(error, body) for error in structured])
        param = _text_of(_common_path(paths))
        messages = [reason_of(error).removeprefix("Value error, ") for error in structured]
        reasons = dict.fromkeys(
            f"{_text_of(path)}: {message}" if _text_of(path) != param else message
            for path, message in zip(paths, messages, strict=True)
        )
        message = "; ".join(list(reasons)[:_MAX_REASONS])
        message = f"Invalid '{param}': {message}." if param else f"{message}."
        codes = {_code(error["type"]) for error in structured}
        code = codes.pop() if len(codes) == 1 else "invalid_value"
    return {
        "message": message[:_MAX_MESSAGE_CHARACTERS],
        "type": "invalid_request_error",
        "param": param[:_MAX_PARAM_CHARACTERS] or None,
        "code": code,
    }


def _of_what_is_there(
    errors: list[Mapping[Any, Any]], paths: list[tuple[str | int, ...]]
) -> tuple[list[Mapping[Any, Any]], list[tuple[str | int, ...]]]:
    """The errors without those of fields that are missing, where a field that is there is wrong. A body that may be of
    several kinds, as a prompt or messages, would otherwise be one that lacks the field of the other kind."""
    kept = [
        (error, path) for error, path in zip(errors, paths, strict=True) if error["type"] != "missing" or len(path) != 1
    ]
    if not any(path for _, path in kept):
        return errors, paths
    return [error for error, _ in kept], [path for _, path in kept]


def _common_path(paths: Sequence[tuple[str | int, ...]]) -> tuple[str | int, ...]:
    levels = zip(*paths, strict=False)  # as deep as the shortest path
    return tuple(parts[0] for parts in takewhile(lambda parts: len({*parts}) == 1, levels))


def _text_of(path: tuple[str | int, ...]) -> str:
    """A path as OpenAI writes it: `messages[0].role`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def _code(kind: str) -> str:
    """OpenAI's code for a kind of pydantic's errors."""
    if kind == "missing":
        return "missing_required_parameter"
    return "invalid_type" if kind.endswith(("_type", "_parsing")) or kind == "is_instance_of" else "invalid_value"


def _path(error: Mapping[str, Any], body: Any) -> tuple[str | int, ...]:
    """Where the error is in the body. pydantic's location also has the names of the types that it tried, which are not
    in the body."""
    location: Sequence[str | int] = error["loc"][1:]
    path: list[str | int] = []
    for position, part in enumerate(location):
        is_missing = error["type"] == "missing" and position == len(location) - 1
        if isinstance(body, dict) and (part in body or is_missing):
            path.append(part)
            body = body.get(part)
        elif isinstance(body, list) and isinstance(part, int) and part < len(body):
            path.append(part)
            body = body[part]
    return tuple(path)


def set_exception_handlers(api: Any, handlers: Mapping[type[Exception], ExceptionHandler]) -> None:
    """Adds or replaces exception handlers of an application whose middleware stack, which holds the handlers of the
    moment when it was built, may be built already."""
    api.exception_handlers.update(handlers)
    _rebuild_middleware_stack(api)


def exception_handler_of(api: Any, kind: type[Exception]) -> ExceptionHandler:
    """The handler that the application has now for exceptions of that type."""
    handlers: Mapping[type, ExceptionHandler] = api.exception_handlers
    if handler := next((handlers[base] for base in kind.__mro__ if base in handlers), None):
        return handler
    raise not_found("starlette", f"a handler of {kind.__name__}", "its answers can't be changed")


def remove_middleware(api: Any, *classes: type) -> None:
    present = {middleware.cls for middleware in api.user_middleware}
    for missing in set(classes) - present:
        raise not_found("starlette", f"the middleware {missing.__name__}", "it can't be removed")
    api.user_middleware = [middleware for middleware in api.user_middleware if middleware.cls not in classes]
    _rebuild_middleware_stack(api)


def _rebuild_middleware_stack(api: Any) -> None:
    if not hasattr(api, "middleware_stack"):
        raise not_found("starlette", "the middleware stack", "changes of an application would have no effect")
    api.middleware_stack = None  # built again with the next request


def not_found(library: str, target: str, consequence: str) -> EngineStartFailed:
    """The error of a patch that finds nothing to change. `library` is the name of an installed distribution."""
    return EngineStartFailed(
        f"{library} {metadata.version(library)} doesn't have {target}, which Graft changes, so {consequence}. Install "
        "the version that Graft was tested with."
    )
