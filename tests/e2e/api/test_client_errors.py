"""Every mistake of a client reaches it as the exception that its own library has for it."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from tests.e2e.api.conftest import MODEL
from tests.e2e.conftest import Server

CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "the rain"}], "max_tokens": 4}


@pytest.mark.parametrize(
    "change",
    [
        {"messages": "no list"},
        {"messages": [{"role": "nobody", "content": 1}]},
        {"temperature": -1},
        {"temperature": "hot"},
        {"top_p": 2},
        {"n": 0},
        {"max_tokens": 100_000},
        {"logprobs": True, "top_logprobs": 1000},
        {"logit_bias": {"100000": 1}},
        {"stop": 7},
        {"stream_options": {"include_usage": True}},
        {"response_format": {"type": "json_schema"}},
        {"structured_outputs": {"regex": "("}},
        {"structured_outputs": {"json": {"type": "nothing"}}},
        {"tools": "hammer"},
        {"tool_choice": {"type": "function", "function": {"name": "missing"}}},
        {"model": 7},
        {"top_k": 2**70},
    ],
    ids=str,
)
def test_a_bad_field_is_a_bad_request(client: openai.OpenAI, change: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError) as told:
        client.post("/chat/completions", body=CHAT | change, cast_to=object)

    body: Any = told.value.body
    assert body["message"]
    assert body["type"]


@pytest.mark.parametrize("path", ["/chat/completions", "/completions", "/responses"])
def test_an_unknown_model_is_not_found_on_every_route(client: openai.OpenAI, path: str) -> None:
    with pytest.raises(openai.NotFoundError) as told:
        client.post(path, body=CHAT | {"model": "italian", "prompt": "a", "input": "a"}, cast_to=object)

    assert told.value.code == "model_not_found"


def test_embeddings_of_a_model_that_generates_are_refused_and_not_unknown(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as told:
        client.embeddings.create(model=MODEL, input="the rain")

    assert told.value.code == "task_unsupported"
    assert "/v1/embeddings" in told.value.message


def test_a_route_that_does_not_exist_is_told_as_such(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as told:
        client.images.generate(prompt="a boat")

    assert told.value.code == "route_not_found"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'"text"', b"\xff\xfe", b'{"model": "french", "prompt": }'])
def test_a_body_that_is_no_json_object_is_a_bad_request(server: Server, content: bytes) -> None:
    for path in ("/v1/chat/completions", "/tokenize", "/v1/messages"):
        answer = httpx.post(server.url + path, content=content, headers={"content-type": "application/json"})

        assert answer.status_code == 400, (path, answer.text)
        assert answer.json()["error"]["message"]


def test_an_error_inside_a_stream_that_has_not_begun_is_a_status(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(**CHAT | {"max_tokens": 100_000}, stream=True)


@pytest.mark.parametrize("content", [[], [{"type": "refusal", "refusal": "no"}]])
def test_a_history_that_the_engine_cannot_read_is_a_bad_request(client: openai.OpenAI, content: list[Any]) -> None:
    said = {"type": "message", "role": "assistant", "id": "m", "status": "completed", "content": content}
    with pytest.raises(openai.BadRequestError, match="can't read"):
        client.post("/responses", body={"model": MODEL, "input": [said], "max_output_tokens": 4}, cast_to=object)


def test_one_request_cannot_ask_for_thousands_of_answers(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="at most 128"):
        client.post("/chat/completions", body=CHAT | {"n": 129}, cast_to=object)


@pytest.mark.parametrize(
    ("path", "field"),
    [("/v1/responses", "input"), ("/v1/chat/completions", "messages"), ("/v1/completions", "prompt")],
)
def test_of_many_wrong_items_the_first_one_is_told(server: Server, path: str, field: str) -> None:
    """All of them are kilobytes each in the answer, and many times that in the engine's memory."""
    wrong = {"/v1/completions": None}.get(path, "a")
    answer = httpx.post(server.url + path, json={"model": MODEL, field: [wrong] * 20_000}, timeout=60)

    assert answer.status_code == 400
    assert answer.json()["error"]["message"]
    assert len(answer.content) < 50_000
