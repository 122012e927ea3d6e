from __future__ import annotations

from typing import Annotated, Any, Literal

import httpx
import pytest
from fastapi import FastAPI
from pydantic import BaseModel, Field, ValidationError
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import Response

from serve.engine import body_validator
from serve.engine.fastapi_patches import (
    describe_invalid_bodies,
    described_error,
    exception_handler_of,
    remove_middleware,
    set_exception_handlers,
    validate_fail_fast,
)
from serve.errors import EngineStartFailed


class Text(BaseModel):
    kind: Literal["text"]
    text: str


class Picture(BaseModel):
    kind: Literal["picture"]
    url: str


class Message(BaseModel):
    content: str | list[Annotated[Text | Picture, Field()]]
    tags: tuple[str, ...] = ()


class Chat(BaseModel):
    messages: list[Message]
    bias: dict[str, float] = {}


@pytest.fixture
def client() -> httpx.AsyncClient:
    app = FastAPI()

    @app.post("/chat")
    async def chat(body: Chat) -> Chat:
        return body

    validate_fail_fast(app)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://engine")


def content(*parts: Any) -> dict[str, Any]:
    return {"messages": [{"content": list(parts)}]}


GOOD = {"messages": [{"content": "a"}, {"content": [{"kind": "text", "text": "b"}]}], "bias": {"7": 1.5}}


async def test_a_good_body_is_what_it_was(client: httpx.AsyncClient) -> None:
    response = await client.post("/chat", json=GOOD)

    assert response.status_code == 200
    assert response.json() == Chat.model_validate(GOOD).model_dump(mode="json")


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [7] * 5000},
        content(*[{"kind": "text"}] * 5000),
        {"messages": [{"content": "", "tags": [1] * 5000}]},
    ],
    ids=["items", "items of an item", "of a tuple"],
)
async def test_the_first_wrong_item_of_a_list_is_reported_and_the_others_are_not(
    client: httpx.AsyncClient, body: dict[str, Any]
) -> None:
    response = await client.post("/chat", json=body)

    assert response.status_code == 422
    errors = response.json()["detail"]
    assert 0 < len(errors) < 10, "one for each kind that it might have been"
    assert all(5000 not in error["loc"] and 1 not in error["loc"][-1:] for error in errors)


async def test_a_wrong_item_after_good_ones_is_reported(client: httpx.AsyncClient) -> None:
    response = await client.post("/chat", json={"messages": [{"content": "a"}] * 50 + [7, 7]})

    assert [error["loc"][:3] for error in response.json()["detail"]] == [["body", "messages", 50]]


async def test_an_object_with_more_keys_than_any_has_is_reported_as_one_error(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(body_validator, "MAX_KEYS", 10)

    response = await client.post("/chat", json=GOOD | {"bias": {str(number): "x" for number in range(11)}})

    (error,) = response.json()["detail"]
    assert error["type"] == "too_many_keys"
    assert "at most 10 keys" in error["msg"]


def test_an_application_without_request_bodies_can_not_be_patched() -> None:
    with pytest.raises(EngineStartFailed, match=r"^fastapi \S+ doesn't have a route with a request body"):
        validate_fail_fast(FastAPI())


class Lost(Exception):
    """Raised by a route of the application."""


@pytest.fixture
def built() -> FastAPI:
    """An application whose middleware stack is built, as vLLM leaves it."""
    app = FastAPI()
    app.add_middleware(CORSMiddleware, allow_origins=["*"])

    @app.get("/")
    async def lose() -> None:
        raise Lost

    app.middleware_stack = app.build_middleware_stack()
    return app


async def test_an_exception_handler_has_effect_in_an_application_that_is_built(built: FastAPI) -> None:
    async def handle(_: Request, error: Exception) -> Response:
        return Response(type(error).__name__, status_code=418)

    set_exception_handlers(built, {Lost: handle})

    assert exception_handler_of(built, Lost) is handle
    async with httpx.AsyncClient(transport=httpx.ASGITransport(built), base_url="http://engine") as client:
        response = await client.get("/")
    assert (response.status_code, response.text) == (418, "Lost")


def test_a_handler_that_is_not_there_is_an_error(built: FastAPI) -> None:
    with pytest.raises(EngineStartFailed, match=r"^starlette \S+ doesn't have a handler of Lost"):
        exception_handler_of(built, Lost)


async def test_a_middleware_is_removed_from_an_application_that_is_built(built: FastAPI) -> None:
    remove_middleware(built, CORSMiddleware)

    async def handle(_: Request, __: Exception) -> Response:
        return Response()

    set_exception_handlers(built, {Lost: handle})
    async with httpx.AsyncClient(transport=httpx.ASGITransport(built), base_url="http://engine") as client:
        response = await client.get("/", headers={"origin": "http://elsewhere"})
    assert "access-control-allow-origin" not in response.headers


def test_a_middleware_that_is_not_there_can_not_be_removed(built: FastAPI) -> None:
    with pytest.raises(EngineStartFailed, match=r"^starlette \S+ doesn't have the middleware GZipMiddleware"):
        remove_middleware(built, CORSMiddleware, GZipMiddleware)

    assert len(built.user_middleware) == 1


@pytest.mark.parametrize(
    ("change", "param", "code", "message"),
    [
        ({"messages": "secret"}, "messages", "invalid_type", "Invalid 'messages': Input should be a valid list."),
        ({"messages": [{"tags": []}]}, "messages[0].content", "missing_required_parameter",
         "Invalid 'messages[0].content': Field required."),
        ({"messages": [{"content": [{"kind": "text"}]}]}, "messages[0].content", "invalid_value",
         "text: Field required"),
        ({"bias": {"7": "secret"}}, "bias.7", "invalid_type", "valid number"),
    ],
)  # fmt: skip
async def test_an_invalid_body_is_described_by_field_and_without_its_values(
    change: dict[str, Any], param: str, code: str, message: str
) -> None:
    app = FastAPI()

    @app.post("/chat")
    async def chat(body: Chat) -> Chat:
        return body

    validate_fail_fast(app)
    describe_invalid_bodies(app)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://engine") as client:
        response = await client.post("/chat", json=GOOD | change)

    error = response.json()["error"]
    assert (response.status_code, error["type"]) == (400, "invalid_request_error")
    assert (error["param"], error["code"]) == (param, code), error
    assert message in error["message"]
    assert "secret" not in response.text


def test_what_is_found_invalid_late_is_described_without_a_path() -> None:
    with pytest.raises(ValidationError) as invalid:
        Text.model_validate({"kind": "text", "text": ["secret"]})

    described = described_error(invalid.value.errors())

    assert described["param"] is None
    assert described["message"] == "Input should be a valid string."


def test_a_reason_that_is_a_text_is_passed_on() -> None:
    assert described_error(["Unsupported Media Type"])["message"] == "Unsupported Media Type"
