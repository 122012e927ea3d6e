"""GET /openapi.json: the routes that callers can reach and no others, from the engine's own OpenAPI document.

Request bodies are described by vLLM's models, unchanged. The responses are corrected: vLLM declares FastAPI's 422 but
answers 400, and the gateway adds responses of its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import BaseModel, Field
from pydantic.json_schema import models_json_schema

from serve.gateway.public_routes import ENGINE_ROUTES, is_anthropic

_SCHEMA_REFERENCE = "#/components/schemas/{model}"
_REFERENCE = re.compile(r'"#/components/schemas/([^"]+)"')
_GATEWAY_RESPONSES = {
    "400": "The request is not what the API takes",
    "404": "No such model",
    "408": "The body did not arrive in time",
    "413": "The body is too large",
    "429": "Too many requests of this caller",
    "500": "A defect of the server",
    "503": "The engine or a place for the request is not available now; see Retry-After",
    "504": "The request ran for as long as one may",
}
_UNKNOWN_CALLER = "No key, or none that is known here"
_SECURITY: dict[str, Any] = {
    "key": {"type": "http", "scheme": "bearer", "description": "A key of the server, or a token of its issuer."},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key", "description": "The same, as Anthropic's."},
}


class GraftErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str = Field(description="Stable.")


class GraftError(BaseModel):
    error: GraftErrorDetail


class GraftMessagesErrorDetail(BaseModel):
    type: str
    message: str
    code: str = Field(description="Graft's own, as elsewhere.")


class GraftMessagesError(BaseModel):
    type: Literal["error"]
    error: GraftMessagesErrorDetail


class GraftModel(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str = Field(description="What the name stands for now: NAME@REVISION.")
    parent: str | None = Field(description="The base model of an adapter.")
    max_model_len: int = Field(description="Tokens of a prompt and its answer together, at most.")


class GraftModelList(BaseModel):
    object: Literal["list"]
    data: list[GraftModel]


_GATEWAY_MODELS: tuple[type[BaseModel], ...] = (GraftError, GraftMessagesError, GraftModel, GraftModelList)


def document(engine: Mapping[str, Any], *, with_keys: bool = False) -> dict[str, Any]:
    """The OpenAPI document. `engine`: that of the engine's application; `with_keys`: callers need a key."""
    paths = {path: {"post": _public(path, engine["paths"][path]["post"])} for path in offered_routes(engine)}
    paths |= _gateway_paths()
    if with_keys:
        _require_keys(paths)
    schemas = _reachable(paths, {**engine.get("components", {}).get("schemas", {}), **gateway_schemas()})
    return {
        "openapi": engine["openapi"],
        "info": {"title": "Graft", "version": "1", "description": "OpenAI's API, answered by vLLM's handlers."},
        "paths": paths,
        "components": {"schemas": schemas} | ({"securitySchemes": _SECURITY} if with_keys else {}),
    }


def offered_routes(engine: Mapping[str, Any]) -> tuple[str, ...]:
    """The public routes that the engine has: which ones depends on the kind of model."""
    return tuple(path for path in ENGINE_ROUTES if "post" in engine["paths"].get(path, ()))


def gateway_schemas() -> dict[str, Any]:
    """The schemas of the gateway's own responses, by name."""
    _, document = models_json_schema(
        [(model, "validation") for model in _GATEWAY_MODELS], ref_template=_SCHEMA_REFERENCE
    )
    schemas: dict[str, Any] = document["$defs"]
    return schemas


def _require_keys(paths: Mapping[str, Any]) -> None:
    """Declares that every operation needs a key, except GET /health."""
    for path, operations in paths.items():
        for operation in operations.values() if path != "/health" else ():
            operation["security"] = [{name: []} for name in _SECURITY]
            unauthorized = {"401": _response(_error_schema(path), _UNKNOWN_CALLER)}
            operation["responses"] = dict(sorted({**operation["responses"], **unauthorized}.items()))


def _public(path: str, operation: Mapping[str, Any]) -> dict[str, Any]:
    """An operation of the engine with the responses that callers can get. The tags, which are vLLM's, are left out."""
    error = _error_schema(path)
    responses = {code: response for code, response in operation["responses"].items() if code.startswith("2")}
    errors = {code: _response(error, description) for code, description in _GATEWAY_RESPONSES.items()}
    if unimplemented := operation["responses"].get("501"):
        errors["501"] = _response(error, unimplemented["description"])
    unchanged = {key: value for key, value in operation.items() if key not in ("responses", "tags")}
    return {**unchanged, "responses": responses | dict(sorted(errors.items()))}


def _error_schema(path: str) -> str:
    return (GraftMessagesError if is_anthropic(path) else GraftError).__name__


def _gateway_paths() -> dict[str, Any]:
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    return {
        "/v1/models": {
            "get": {
                "summary": "List Models",
                "operationId": "list_models",
                "responses": {"200": _response("GraftModelList", "The base model and every adapter")},
            }
        },
        "/v1/models/{name}": {
            "get": {
                "summary": "Retrieve Model",
                "operationId": "retrieve_model",
                "parameters": [name],
                "responses": {
                    "200": _response("GraftModel", "One of them"),
                    "404": _response("GraftError", "No such model"),
                },
            }
        },
        "/health": {
            "get": {
                "summary": "Health",
                "operationId": "health",
                "responses": {
                    "200": {"description": "The engine is alive"},
                    "503": _response("GraftError", "It is being replaced"),
                },
            }
        },
        "/health/{name}": {
            "get": {
                "summary": "Health of a base model",
                "operationId": "health_of_base_model",
                "parameters": [name],
                "responses": {
                    "200": {"description": "One of its engines answers"},
                    "404": _response("GraftError", "No such base model"),
                    "503": _response("GraftError", "None answers at the moment"),
                },
            }
        },
    }


def _response(schema: str, description: str) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": _SCHEMA_REFERENCE.format(model=schema)}}}
    return {"description": description, "content": content}


def _reachable(paths: Mapping[str, Any], schemas: Mapping[str, Any]) -> dict[str, Any]:
    """The schemas that the paths refer to, directly or through other schemas."""
    reachable: dict[str, Any] = {}
    waiting = _referred([paths])
    while waiting:
        referred = {name: schemas[name] for name in waiting}
        reachable |= referred
        waiting = _referred(referred.values()) - reachable.keys()
    return dict(sorted(reachable.items()))


def _referred(parts: Iterable[Any]) -> set[str]:
    return {name for part in parts for name in _REFERENCE.findall(json.dumps(part))}
