from __future__ import annotations

import types
from collections.abc import AsyncGenerator
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
from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.metrics.loggers import PrometheusStatLogger

from serve.engine import vllm_patches
from serve.engine.grammars.vllm_grammars import EngineGrammars, GrammarTooCostly
from serve.engine.token_counter import count_tokens
from serve.engine.vllm_patches import (
    AdapterNames,
    count_generated_tokens,
    engine_class,
    hide_values,
    map_client_errors_to_400,
    map_overflows_to_400,
    stat_logger_class,
)
from serve.errors import EngineStartFailed

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


class Grammars(EngineGrammars):
    """Refuses the regex `costly`."""

    def __init__(self) -> None:
        """Without an engine."""
        self._trials = None

    async def check(self, parameters: Any) -> None:
        if parameters is not None and parameters.structured_outputs.regex == "costly":
            raise GrammarTooCostly("Send a simpler one.", "grammar_too_costly")


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
    map_client_errors_to_400(app, EngineFailed)
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


def test_numbers_are_answered_in_the_same_way_where_vllm_itself_turns_an_exception_into_a_response() -> None:
    router = types.SimpleNamespace(create_error_response=create_error_response)
    map_overflows_to_400(router)

    def answer_of(cause: Exception) -> ErrorResponse:
        try:
            raise EngineFailed from cause
        except EngineFailed as error:
            answer: ErrorResponse = router.create_error_response(error)
            return answer

    too_large = answer_of(OverflowError("can't serialize ints >= 2**64"))
    assert too_large.error.code == 400
    assert (
        too_large.error.message
        == "A number in this request is too large for the engine: can't serialize ints >= 2**64."
    )
    assert answer_of(RuntimeError("the engine failed")).error.code == 500


async def test_any_other_failure_of_the_engine_is_reported_as_before() -> None:
    async with client(READER) as engine:
        assert (await engine.post("/", json={"number": 7})).status_code == 500


def test_a_router_that_answers_errors_otherwise_is_an_error() -> None:
    with pytest.raises(EngineStartFailed, match=r"^vllm\S* \S+ doesn't have .*create_error_response"):
        map_overflows_to_400(types.SimpleNamespace())


def test_a_module_of_bodies_that_is_gone_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_patches, "BODY_MODULES", ("vllm.renderers.gone",))

    with pytest.raises(EngineStartFailed, match=r"doesn't have the module vllm\.renderers\.gone"):
        map_client_errors_to_400(Starlette(), EngineFailed)


def test_an_application_that_does_not_handle_the_errors_of_the_engine_is_an_error() -> None:
    with pytest.raises(EngineStartFailed, match="doesn't have a handler of EngineFailed"):
        map_client_errors_to_400(Starlette(), EngineFailed)


@pytest.mark.parametrize("is_positional", [True, False])
async def test_the_adapter_of_a_request_is_remembered(monkeypatch: pytest.MonkeyPatch, is_positional: bool) -> None:
    request = LoRARequest(lora_name="pirate@1", lora_int_id=1, lora_path="/adapters/pirate")
    passed: list[Any] = []

    async def add_request(self: object, *args: object, **options: object) -> None:
        passed.append((args, options))

    monkeypatch.setattr(AsyncLLM, "add_request", add_request)
    names = AdapterNames()
    engine = object.__new__(engine_class(names, Grammars()))

    await engine.add_request("base", "prompt", None, lora_request=None)
    if is_positional:
        await engine.add_request("1", "prompt", None, None, request)
    else:
        await engine.add_request("1", "prompt", None, lora_request=request)

    assert names == {"base": None, "1": "pirate@1"}
    assert len(passed) == 2


@pytest.mark.parametrize("is_positional", [True, False])
async def test_a_grammar_that_costs_too_much_never_reaches_the_engine(
    monkeypatch: pytest.MonkeyPatch, is_positional: bool
) -> None:
    passed: list[str] = []

    async def add_request(self: object, request_id: str, *args: object, **options: object) -> None:
        passed.append(request_id)

    monkeypatch.setattr(AsyncLLM, "add_request", add_request)
    engine: Any = object.__new__(engine_class(AdapterNames(), Grammars()))

    async def add(request_id: str, regex: str) -> None:
        parameters = SamplingParams(structured_outputs=StructuredOutputsParams(regex=regex))
        if is_positional:
            await engine.add_request(request_id, "prompt", parameters)
        else:
            await engine.add_request(request_id, prompt="prompt", params=parameters)

    await add("1", "cheap")
    with pytest.raises(GrammarTooCostly):
        await add("2", "costly")

    assert passed == ["1"]


async def test_the_code_of_a_grammar_that_costs_too_much_is_kept() -> None:
    async def generate(*_: object, **__: object) -> AsyncGenerator[Any, None]:
        raise GrammarTooCostly("Send a simpler one.", "grammar_too_costly")
        yield

    engine: Any = types.SimpleNamespace(generate=generate, encode=generate)
    count_generated_tokens(engine)

    with count_tokens() as tokens, pytest.raises(GrammarTooCostly):
        async for _ in engine.generate("", SamplingParams()):
            pass

    assert tokens.fault is not None
    assert tokens.fault.status == 400
    assert (tokens.fault.error["code"], tokens.fault.error["param"]) == ("grammar_too_costly", "grammar")


def test_a_logger_without_the_gauge_of_adapters_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PrometheusStatLogger, "__init__", lambda self: None)

    with pytest.raises(EngineStartFailed, match=r"doesn't have PrometheusStatLogger\.gauge_lora_info"):
        stat_logger_class(AdapterNames(), lambda _: None)()


def test_an_error_of_vllm_says_nothing_of_the_value(monkeypatch: pytest.MonkeyPatch) -> None:
    class Invalid(VLLMValidationError):
        __str__ = VLLMValidationError.__str__

    hide_values(Invalid)

    assert str(Invalid("n must be positive.", parameter="n", value="secret")) == "n must be positive."
    with pytest.raises(EngineStartFailed, match="may repeat what the client sent"):
        hide_values(EngineFailed)


@pytest.mark.parametrize("token_ids", [[], [7]], ids=["not compiled", "no token allowed"])
async def test_a_grammar_that_allows_no_text_is_the_clients_error(token_ids: list[int]) -> None:
    async def generate(*_: object, **__: object) -> AsyncGenerator[Any, None]:
        yield types.SimpleNamespace(
            prompt_token_ids=[1], outputs=[types.SimpleNamespace(index=0, token_ids=token_ids, finish_reason="error")]
        )

    engine: Any = types.SimpleNamespace(generate=generate, encode=generate)
    count_generated_tokens(engine)
    grammar = SamplingParams(structured_outputs=StructuredOutputsParams(grammar="root ::= root"))

    with count_tokens() as tokens, pytest.raises(VLLMValidationError, match="refer to itself without an end"):
        async for _ in engine.generate("", grammar):
            pass
    with count_tokens() as others:
        assert [output async for output in engine.generate("", SamplingParams())]

    assert tokens.fault is not None
    assert (tokens.fault.status, tokens.fault.error["param"]) == (400, "grammar")
    assert others.fault is None
