"""The OpenAPI document is true, and nothing that fits it, or just doesn't, makes the server fail or hang."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import Counter
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import Case, GenerationMode
from schemathesis.specs.openapi import checks

from serve.gateway.public_routes import ENGINE_ROUTES
from tests.e2e.api.conftest import MODEL
from tests.e2e.conftest import Server

SEED = 20
MAX_EXAMPLES = 60
MAX_OPERATION_S = 5.0
MAX_ANSWER_S = 20.0
OF_THIS_MODEL = sorted({*ENGINE_ROUTES} - {"/v1/embeddings"})
TRUE = (
    schemathesis.checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
)


class Enough(BaseException):
    """The time of one route is over."""


@pytest.fixture(scope="module")
def document(server: Server) -> dict[str, Any]:
    described: dict[str, Any] = httpx.get(f"{server.url}/openapi.json").json()
    return described


def test_it_describes_every_route_that_this_model_has_and_nothing_internal(document: dict[str, Any]) -> None:
    assert set(document["paths"]) == {*OF_THIS_MODEL, "/health", "/health/{name}", "/v1/models", "/v1/models/{name}"}
    assert "ChatCompletionRequest" in document["components"]["schemas"]
    assert not [name for name in document["components"]["schemas"] if "Lora" in name or "Scale" in name]


@pytest.mark.parametrize(
    ("path", "mode"),
    [*itertools.product(OF_THIS_MODEL, GenerationMode), ("/v1/models/{name}", GenerationMode.POSITIVE)],
    ids=lambda value: getattr(value, "value", value),
)
def test_fuzzing_finds_no_server_error_and_no_hang(
    server: Server, document: dict[str, Any], path: str, mode: GenerationMode
) -> None:
    schema: Any = schemathesis.openapi.from_dict(asking_for(document, MODEL))
    schema.config.update(base_url=server.url)
    operation = schema[path]["get" if "{" in path else "post"]
    answers: Counter[int] = Counter()
    ends = time.monotonic() + MAX_OPERATION_S

    @seed(SEED)
    @settings(
        max_examples=MAX_EXAMPLES,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def fuzz(case: Case) -> None:
        if time.monotonic() > ends:
            raise Enough
        response = bounded(case).call(timeout=MAX_ANSWER_S)
        case.validate_response(response, checks=list(TRUE))
        answers[response.status_code] += 1

    with contextlib.suppress(Enough):
        fuzz()
    assert answers, "nothing was asked"
    assert httpx.get(f"{server.url}/health").is_success


def asking_for(document: dict[str, Any], model: str) -> dict[str, Any]:
    """The document with one name as the only model: others end in a 404 before anything else is looked at."""
    schemas = {
        name: {**schema, "properties": {**schema["properties"], "model": {"const": model}}}
        if name.endswith("Request") and "model" in schema.get("properties", {})
        else schema
        for name, schema in document["components"]["schemas"].items()
    }
    return {**document, "components": {"schemas": schemas}}


def bounded(case: Case) -> Case:
    """The same request for a few tokens where it left that open: a whole context of them would take too long."""
    if isinstance(case.body, dict):
        for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
            value = case.body.get(name)
            if value is None or (isinstance(value, int) and value > 8):
                case.body[name] = 4
        if isinstance(value := case.body.get("n"), int) and value > 4:
            case.body["n"] = 4
    return case
