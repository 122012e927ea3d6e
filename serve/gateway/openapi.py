"""GET /openapi.json: what callers can reach and nothing else, from the engine's own description of its routes.

Request bodies are described by vLLM's models as they are. What an answer may be is corrected: vLLM declares FastAPI's
422 but answers 400, and the gateway adds answers of its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from serve.openai import ENGINE_ROUTES, is_anthropic

_REFERENCE = re.compile(r'"#/components/schemas/([^"]+)"')
# FastAPI's answer to a body that doesn't fit; vLLM replaces it by a 400.
_NEVER_SENT = "422"
_GATEWAY_ANSWERS = {
    "400": "The request is not what the API takes",
    "404": "No such model",
    "413": "The body is too large",
    "429": "Too many requests of this caller",
    "500": "A defect of the server",
    "503": "The engine or a place for the request is not available now; see Retry-After",
}
_UNKNOWN_CALLER = {"401": "No key, or none that is known here"}
_SECURITY: dict[str, Any] = {
    "key": {"type": "http", "scheme": "bearer", "description": "A key of the server, or a token of its issuer."},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key", "description": "The same, as Anthropic's."},
}
_OWN_SCHEMAS: dict[str, Any] = {
    "GraftError": {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["message", "type", "code"],
                "properties": {
                    "message": {"type": "string"},
                    "type": {"type": "string"},
                    "param": {"type": ["string", "null"]},
                    "code": {"type": ["string", "integer", "null"], "description": "Stable; vLLM's is the status."},
                },
            }
        },
    },
    "GraftAnthropicError": {
        "description": "Anthropic's shape; vLLM tells a body that doesn't fit in OpenAI's.",
        "anyOf": [{"$ref": "#/components/schemas/GraftMessagesError"}, {"$ref": "#/components/schemas/GraftError"}],
    },
    "GraftMessagesError": {
        "type": "object",
        "required": ["type", "error"],
        "properties": {
            "type": {"const": "error"},
            "error": {
                "type": "object",
                "required": ["type", "message"],
                "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
            },
        },
    },
    "GraftModel": {
        "type": "object",
        "required": ["id", "object", "created", "owned_by", "root", "parent"],
        "properties": {
            "id": {"type": "string"},
            "object": {"const": "model"},
            "created": {"type": "integer"},
            "owned_by": {"type": "string"},
            "root": {"type": "string", "description": "What the name stands for now: NAME@REVISION."},
            "parent": {"type": ["string", "null"], "description": "The base model of an adapter."},
        },
    },
    "GraftModelList": {
        "type": "object",
        "required": ["object", "data"],
        "properties": {
            "object": {"const": "list"},
            "data": {"type": "array", "items": {"$ref": "#/components/schemas/GraftModel"}},
        },
    },
}


def document(engine: Mapping[str, Any], *, with_keys: bool = False) -> dict[str, Any]:
    """The OpenAPI document; `engine` is that of the engine's application, `with_keys`: only known callers get in."""
    paths = {path: {"post": _public(path, engine["paths"][path]["post"])} for path in offered(engine)}
    paths |= _own_paths()
    if with_keys:
        _close(paths)
    schemas = _reachable(paths, {**_named(engine), **_OWN_SCHEMAS})
    return {
        "openapi": engine["openapi"],
        "info": {"title": "Graft", "version": "1", "description": "OpenAI's API, answered by vLLM's handlers."},
        "paths": paths,
        "components": {"schemas": schemas} | ({"securitySchemes": _SECURITY} if with_keys else {}),
    }


def _close(paths: Mapping[str, Any]) -> None:
    """Everything but the question whether the server lives asks for one of the schemes."""
    for path, operations in paths.items():
        for operation in operations.values() if path != "/health" else ():
            operation["security"] = [{name: []} for name in _SECURITY]
            told = {code: _answer(_error(path), text) for code, text in _UNKNOWN_CALLER.items()}
            operation["responses"] = dict(sorted({**operation["responses"], **told}.items()))


def offered(engine: Mapping[str, Any]) -> tuple[str, ...]:
    """Those of the public routes that the engine has: not all of them go with every kind of model."""
    return tuple(path for path in ENGINE_ROUTES if "post" in engine["paths"].get(path, ()))


def _public(path: str, operation: Mapping[str, Any]) -> dict[str, Any]:
    error = _error(path)
    answers = {code: it for code, it in operation["responses"].items() if code.startswith("2")}
    others = {code: it for code, it in operation["responses"].items() if code == "501"}
    told = {code: _answer(error, text) for code, text in _GATEWAY_ANSWERS.items()}
    told |= {code: _answer(error, it["description"]) for code, it in others.items()}
    return {**_without_prefixes(operation), "responses": answers | dict(sorted(told.items()))}


def _error(path: str) -> str:
    return "GraftAnthropicError" if is_anthropic(path) else "GraftError"


def _without_prefixes(operation: Mapping[str, Any]) -> dict[str, Any]:
    """The engine's tags and names of functions tell a caller nothing."""
    return {key: it for key, it in operation.items() if key not in ("responses", "tags")}


def _own_paths() -> dict[str, Any]:
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    return {
        "/v1/models": {
            "get": {
                "summary": "List Models",
                "operationId": "list_models",
                "responses": {"200": _answer("GraftModelList", "The base model and every adapter")},
            }
        },
        "/v1/models/{name}": {
            "get": {
                "summary": "Retrieve Model",
                "operationId": "retrieve_model",
                "parameters": [name],
                "responses": {
                    "200": _answer("GraftModel", "One of them"),
                    "404": _answer("GraftError", "No such model"),
                },
            }
        },
        "/health": {
            "get": {
                "summary": "Health",
                "operationId": "health",
                "responses": {
                    "200": {"description": "The engine is alive"},
                    "503": _answer("GraftError", "It is being replaced"),
                },
            }
        },
    }


def _answer(schema: str, description: str) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
    return {"description": description, "content": content}


def _named(engine: Mapping[str, Any]) -> dict[str, Any]:
    schemas: dict[str, Any] = engine.get("components", {}).get("schemas", {})
    return schemas


def _reachable(paths: Mapping[str, Any], schemas: Mapping[str, Any]) -> dict[str, Any]:
    """The schemas that the paths refer to, and those that these refer to."""
    kept: dict[str, Any] = {}
    waiting = _referred([paths])
    while waiting:
        new = {name: schemas[name] for name in waiting}
        kept |= new
        waiting = _referred(new.values()) - kept.keys()
    return dict(sorted(kept.items()))


def _referred(parts: Iterable[Any]) -> set[str]:
    return {name for part in parts for name in _REFERENCE.findall(json.dumps(part))}
