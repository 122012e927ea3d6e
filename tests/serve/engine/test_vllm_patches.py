from __future__ import annotations

import types
from typing import Any

import httpx
import msgspec
import pytest
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response

from serve.misread import tell_misread, tell_misread_in

READER = "vllm.entrypoints.openai.responses.utils"
CODE = """
def read(body):
    for part in body.get("parts", ()):
        assert isinstance(part, dict)
    return (Answer() if body.get("refused") else body["content"][0]).text
"""


class Answer(BaseModel):
    """Without the text that is asked for."""


class EngineFailed(Exception):
    """What the engine raises, from whatever the cause was."""


def client(module_name: str) -> httpx.AsyncClient:
    """Of an application whose bodies are read by a module of that name; like vLLM it tells other errors as 500."""
    module: Any = types.ModuleType(module_name)
    module.Answer = Answer
    exec(CODE, module.__dict__)

    async def route(request: Request) -> JSONResponse:
        body = await request.json()
        if "number" in body:
            try:
                msgspec.msgpack.encode(body["number"])
                raise RuntimeError("the engine failed")
            except Exception as error:
                raise EngineFailed from error
        return JSONResponse(module.read(body))

    async def other(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"error": {"message": str(error)}}, status_code=500)

    app = Starlette(routes=[Route("/", route, methods=["POST"])], exception_handlers={Exception: other})
    app.middleware_stack = app.build_middleware_stack()  # as vLLM leaves it
    tell_misread(app, EngineFailed)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://engine")


@pytest.mark.parametrize("body", [{"content": []}, {"content": ["refusal"]}, {"refused": True}, {}, {"parts": [7]}])
@pytest.mark.parametrize(
    "reader", [READER, "vllm.renderers.chat_utils", "vllm.entrypoints.openai.chat_completion.protocol"]
)
async def test_a_body_that_the_engine_stumbles_over_is_a_bad_request(body: dict[str, Any], reader: str) -> None:
    async with client(reader) as engine:
        response = await engine.post("/", json=body)

    assert response.status_code == 400
    assert response.json()["error"]["type"] == "BadRequestError"


async def test_the_same_error_from_anywhere_else_stays_a_server_error(caplog: pytest.LogCaptureFixture) -> None:
    async with client("vllm.v1.engine") as engine:
        assert (await engine.post("/", json={"content": []})).status_code == 500


async def test_a_number_that_does_not_fit_a_message_to_the_engine_is_a_bad_request() -> None:
    async with client(READER) as engine:
        response = await engine.post("/", content=b'{"number": 585959563330838724608}')

    assert response.status_code == 400
    assert "too large" in response.json()["error"]["message"]


def test_so_it_is_where_vllm_itself_turns_an_exception_into_an_answer() -> None:
    router = types.SimpleNamespace(create_error_response=create_error_response)
    tell_misread_in(router)

    def told(cause: Exception) -> ErrorResponse:
        try:
            raise EngineFailed from cause
        except EngineFailed as error:
            answer: ErrorResponse = router.create_error_response(error)
            return answer

    too_large = told(OverflowError("can't serialize ints >= 2**64"))
    assert (too_large.error.code, too_large.error.message) == (400, "can't serialize ints >= 2**64")
    assert told(RuntimeError("the engine failed")).error.code == 500


async def test_any_other_failure_of_the_engine_is_told_as_before() -> None:
    async with client(READER) as engine:
        assert (await engine.post("/", json={"number": 7})).status_code == 500
