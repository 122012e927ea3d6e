from __future__ import annotations

import types
from typing import Any

import httpx
import pytest
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from serve.misread import tell_misread

READER = "vllm.entrypoints.openai.responses.utils"
CODE = "def read(body):\n    return (Answer() if body.get('refused') else body['content'][0]).text\n"


class Answer(BaseModel):
    """Without the text that is asked for."""


def client(module_name: str) -> httpx.AsyncClient:
    """Of an application whose bodies are read by a module of that name; like vLLM it tells other errors as 500."""
    module: Any = types.ModuleType(module_name)
    module.Answer = Answer
    exec(CODE, module.__dict__)

    async def route(request: Request) -> JSONResponse:
        return JSONResponse(module.read(await request.json()))

    async def other(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"error": {"message": str(error)}}, status_code=500)

    app = Starlette(routes=[Route("/", route, methods=["POST"])], exception_handlers={Exception: other})
    app.middleware_stack = app.build_middleware_stack()  # as vLLM leaves it
    tell_misread(app)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://engine")


@pytest.mark.parametrize("body", [{"content": []}, {"content": ["refusal"]}, {"refused": True}, {}])
async def test_a_body_that_the_engine_stumbles_over_is_a_bad_request(body: dict[str, Any]) -> None:
    async with client(READER) as engine:
        response = await engine.post("/", json=body)

    assert response.status_code == 400
    assert response.json()["error"]["type"] == "BadRequestError"


async def test_the_same_error_from_anywhere_else_stays_a_server_error(caplog: pytest.LogCaptureFixture) -> None:
    async with client("vllm.v1.engine") as engine:
        assert (await engine.post("/", json={"content": []})).status_code == 500
