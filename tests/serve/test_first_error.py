from __future__ import annotations

from typing import Annotated, Any, Literal

import httpx
import pytest
from fastapi import FastAPI
from pydantic import BaseModel, Field

from serve import first_error
from serve.first_error import stop_at_first_error


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

    stop_at_first_error(app)
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
async def test_the_first_wrong_item_of_a_list_is_told_and_the_others_are_not(
    client: httpx.AsyncClient, body: dict[str, Any]
) -> None:
    response = await client.post("/chat", json=body)

    assert response.status_code == 422
    told = response.json()["detail"]
    assert 0 < len(told) < 10, "one for each kind that it might have been"
    assert all(5000 not in it["loc"] and 1 not in it["loc"][-1:] for it in told)


async def test_a_wrong_item_after_good_ones_is_told(client: httpx.AsyncClient) -> None:
    response = await client.post("/chat", json={"messages": [{"content": "a"}] * 50 + [7, 7]})

    assert [it["loc"][:3] for it in response.json()["detail"]] == [["body", "messages", 50]]


async def test_an_object_with_more_keys_than_any_has_is_told_as_one_error(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(first_error, "MOST_KEYS", 10)

    response = await client.post("/chat", json=GOOD | {"bias": {str(number): "x" for number in range(11)}})

    (told,) = response.json()["detail"]
    assert told["type"] == "too_many_keys"
    assert "at most 10 keys" in told["msg"]
