from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from serve.gateway.app import openapi
from serve.gateway.public_routes import ENGINE_ROUTES

ENGINE: dict[str, Any] = {
    "openapi": "3.1.0",
    "info": {"title": "FastAPI", "version": "0.1.0"},
    "paths": {
        "/v1/completions": {
            "post": {
                "tags": ["internal"],
                "requestBody": {
                    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Completion"}}}
                },
                "responses": {
                    "200": {"description": "OK", "content": {"application/json": {}, "text/event-stream": {}}},
                    "422": {"description": "Validation Error", "content": {"application/json": {}}},
                    "501": {"description": "Not Implemented"},
                },
            }
        },
        "/v1/messages": {"post": {"responses": {"200": {"description": "OK"}}}},
        "/v1/load_lora_adapter": {
            "post": {"requestBody": {"$ref": "#/components/schemas/Secret"}, "responses": {"200": {}}}
        },
        "/metrics": {"get": {"responses": {"200": {}}}},
    },
    "components": {
        "schemas": {
            "Completion": {"properties": {"options": {"$ref": "#/components/schemas/Options"}}},
            "Options": {"properties": {"again": {"$ref": "#/components/schemas/Completion"}}},
            "Secret": {"type": "string"},
        }
    },
}


@pytest.fixture
def document() -> dict[str, Any]:
    return openapi.document(ENGINE)


def test_only_public_routes_that_the_engine_has_are_described(document: dict[str, Any]) -> None:
    engine_routes = set(document["paths"]) & set(ENGINE["paths"])

    assert engine_routes == {"/v1/completions", "/v1/messages"} == set(openapi.offered_routes(ENGINE))
    assert engine_routes < set(ENGINE_ROUTES)


def test_schemas_come_along_with_what_they_refer_to_and_no_others(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]

    assert {"Completion", "Options"} < set(schemas)
    assert "Secret" not in json.dumps(document)


def test_what_is_never_answered_is_not_declared_and_what_the_gateway_answers_is(document: dict[str, Any]) -> None:
    answers = document["paths"]["/v1/completions"]["post"]["responses"]

    assert set(answers) == {"200", "400", "404", "408", "413", "429", "500", "501", "503", "504"}
    assert answers["200"] == ENGINE["paths"]["/v1/completions"]["post"]["responses"]["200"]
    assert answers["501"]["content"]["application/json"]["schema"]["$ref"].endswith("/GraftError")


def test_errors_of_each_route_are_described_in_the_shape_that_it_has(document: dict[str, Any]) -> None:
    for path, schema in (("/v1/completions", "GraftError"), ("/v1/messages", "GraftMessagesError")):
        error = document["paths"][path]["post"]["responses"]["404"]["content"]["application/json"]["schema"]
        assert error == {"$ref": f"#/components/schemas/{schema}"}


def test_a_server_for_known_callers_says_how_they_are_known() -> None:
    document = openapi.document(ENGINE, with_keys=True)
    operations = {path: next(iter(methods.values())) for path, methods in document["paths"].items()}

    assert {
        scheme["scheme"] for scheme in document["components"]["securitySchemes"].values() if "scheme" in scheme
    } == {"bearer"}
    for path, operation in operations.items():
        assert ("security" in operation) == ("401" in operation["responses"]) == (path != "/health")
    named = {name for requirement in operations["/v1/models"]["security"] for name in requirement}
    assert named == set(document["components"]["securitySchemes"])


def test_a_server_without_keys_asks_for_none(document: dict[str, Any]) -> None:
    assert "security" not in json.dumps(document)


@pytest.mark.parametrize("name", ["GraftError", "GraftMessagesError", "GraftModel", "GraftModelList"])
def test_every_schema_of_ours_is_one(document: dict[str, Any], name: str) -> None:
    jsonschema.Draft202012Validator.check_schema(document["components"]["schemas"][name])
