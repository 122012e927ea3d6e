"""The OpenAPI document is true, and nothing that fits it, or just doesn't, makes the server fail or hang."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve.openai import ENGINE_ROUTES
from tests.e2e.conftest import Server

SEED = 20
MAX_EXAMPLES = 15
MAX_RUN_S = 60
MAX_ANSWER_S = 20
CHECKS = ("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance")


@pytest.fixture(scope="module")
def document(server: Server) -> dict[str, Any]:
    described: dict[str, Any] = httpx.get(f"{server.url}/openapi.json").json()
    return described


def test_it_describes_every_route_that_this_model_has_and_nothing_internal(document: dict[str, Any]) -> None:
    own = {"/health", "/v1/models", "/v1/models/{name}"}

    assert set(document["paths"]) == {*ENGINE_ROUTES, *own} - {"/v1/embeddings"}
    assert "ChatCompletionRequest" in document["components"]["schemas"]
    assert not [name for name in document["components"]["schemas"] if "Lora" in name or "Scale" in name]


def test_fuzzing_it_finds_no_server_error_and_no_hang(server: Server, tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json", "--seed", str(SEED)),
        *("--checks", ",".join(CHECKS), "--phases", "coverage,fuzzing", "--max-examples", str(MAX_EXAMPLES)),
        *("--max-time", str(MAX_RUN_S), "--request-timeout", str(MAX_ANSWER_S), "--no-shrink", "--no-color"),
        *("--continue-on-failure", "--generation-database", "none", "--warnings", "off"),
    ]
    found = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path, timeout=300)

    assert found.returncode == 0, found.stdout[-20_000:]
    assert httpx.get(f"{server.url}/health").is_success
