"""Every mistake of a client reaches it as the exception that its own library has for it."""

from __future__ import annotations

import itertools
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
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/chat/completions", body=CHAT | change, cast_to=object)

    body: Any = caught.value.body
    assert body["message"]
    assert body["type"] == "invalid_request_error"
    assert isinstance(body["code"], str)
    assert "parameter=" not in body["message"]


@pytest.mark.parametrize(
    ("path", "change", "param", "code"),
    [
        ("/chat/completions", {"messages": "secret"}, "messages", "invalid_type"),
        ("/chat/completions", {"messages": [{"role": "user", "content": [{"type": "secret"}]}]}, None, None),
        ("/chat/completions", {"messages": [{"content": "secret"}]}, "messages[0]", None),
        ("/chat/completions", {"temperature": "secret"}, "temperature", "invalid_type"),
        ("/chat/completions", {"logit_bias": {"100000": 1}}, "logit_bias", "invalid_value"),
        ("/completions", {"prompt": {"secret": "secret"}}, "prompt", "invalid_type"),
        ("/responses", {"input": 7}, "input", "invalid_type"),
        ("/responses", {"input": "a", "tools": [{"type": "web_search"}]}, "tools[0].type", "tool_unsupported"),
    ],
)
def test_an_error_names_the_field_and_repeats_nothing(
    client: openai.OpenAI, path: str, change: dict[str, Any], param: str | None, code: str | None
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.post(path, body=CHAT | change, cast_to=object)

    error = caught.value
    assert error.type == "invalid_request_error"
    assert param is None or (error.param or "").startswith(param), error.body
    assert code is None or error.code == code, error.body
    assert "secret" not in error.response.text


MESSAGES = CHAT["messages"]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 1},
    "/v1/completions": {"prompt": "the rain", "max_tokens": 1},
    "/v1/responses": {"input": "the rain", "max_output_tokens": 1},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 1},
    "/v1/messages/count_tokens": {"messages": MESSAGES},
    "/tokenize": {"prompt": "the rain"},
    "/detokenize": {"tokens": [17]},
}
WRONG: tuple[Any, ...] = (None, 7, "secret", [None], [{"type": None}], {"type": None})
OF_PYTHON = ("NoneType", "object is not", "has no attribute", "unexpected keyword", "KeyError", "indices must be")


@pytest.mark.parametrize("path", BODIES)
def test_null_or_a_wrong_type_in_any_field_is_no_fault_and_not_answered_with_the_words_of_python(
    server: Server, path: str
) -> None:
    document = httpx.get(f"{server.url}/openapi.json").json()
    wrongly_answered = []
    with httpx.Client(base_url=server.url, timeout=60) as http:
        for field, wrong in itertools.product(fields_of(document, path), WRONG):
            answer = http.post(path, json={"model": MODEL} | BODIES[path] | {field: wrong})
            if answer.status_code >= 500 or (answer.is_error and any(text in answer.text for text in OF_PYTHON)):
                wrongly_answered.append(({field: wrong}, answer.status_code, answer.text))

    assert wrongly_answered == []


def fields_of(document: dict[str, Any], path: str) -> list[str]:
    """The fields of the bodies that a route takes, as the server describes them."""
    schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    names = [part["$ref"].rpartition("/")[2] for part in schema.get("anyOf", [schema])]
    return sorted({field for name in names for field in document["components"]["schemas"][name]["properties"]})


@pytest.mark.parametrize(
    ("path", "change"),
    [
        ("/v1/chat/completions", {"messages": None}),
        ("/v1/messages", {"messages": None}),
        ("/v1/responses", {"input": None}),
        ("/detokenize", {"tokens": None}),
    ],
)
def test_null_in_place_of_what_is_required_names_the_field(server: Server, path: str, change: dict[str, None]) -> None:
    answer = httpx.post(server.url + path, json={"model": MODEL} | BODIES[path] | change, timeout=60)

    (field,) = change
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert field in error["message"]
    assert "should be a valid" in error["message"]
    assert "param" not in error or (error["param"], error["code"]) == (field, "invalid_type"), error


TOO_LONG = "word " * 3000


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": TOO_LONG}]}, "messages"),
        ("/v1/completions", {"prompt": TOO_LONG}, "prompt"),
        ("/v1/responses", {"input": TOO_LONG}, "input"),
        ("/v1/messages", {"messages": [{"role": "user", "content": TOO_LONG}], "max_tokens": 4}, None),
    ],
)
def test_a_prompt_that_is_too_long_has_the_code_that_agents_look_for(
    server: Server, path: str, fields: dict[str, Any], param: str | None
) -> None:
    for streams in (False, True):
        response = httpx.post(server.url + path, json={"model": MODEL, "stream": streams, **fields}, timeout=60)

        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
        assert error["type"] == "invalid_request_error"
        assert error.get("param") == param


def schema_format(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


SELF_REFERENCE = {"type": "json_schema", "name": "x", "schema": {"$ref": "#"}}
CIRCLE = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/chat/completions", {"response_format": schema_format({"$ref": "#"})}, "response_format"),
        ("/chat/completions", {"response_format": schema_format(CIRCLE)}, "response_format"),
        ("/chat/completions", {"response_format": schema_format({"$ref": "#/$defs/none"})}, "response_format"),
        ("/chat/completions", {"structured_outputs": {"grammar": "root ::= root"}}, "structured_outputs"),
        ("/chat/completions", {"structured_outputs": {"regex": "("}}, "structured_outputs"),
        ("/chat/completions", {"logit_bias": {"100000": 1}}, "logit_bias"),
        ("/responses", {"input": "a", "text": {"format": SELF_REFERENCE}}, "text"),
    ],
)
def test_what_the_engine_refuses_is_a_status_before_the_first_token_of_a_stream_too(
    client: openai.OpenAI, path: str, fields: dict[str, Any], param: str, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.post(path, body=CHAT | fields | {"stream": stream}, cast_to=object)

    assert (caught.value.type, caught.value.param) == ("invalid_request_error", param)


COSTLY = ".?" * 3000  # in a JSON string, for which the small vocabulary has few tokens


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "fields", "code", "param"),
    [
        ("/chat/completions", {"structured_outputs": {"choice": ["a" * 7000] * 40}}, "grammar_too_large", None),
        ("/chat/completions", {"structured_outputs": {"regex": ".?" * 400}}, "grammar_too_costly", None),
        ("/completions", {"prompt": "a", "structured_outputs": {"grammar": f"root ::= {'[^a]? ' * 400}"}},
         "grammar_too_costly", None),
        ("/chat/completions", {"response_format": schema_format({"type": "string", "pattern": COSTLY})},
         "grammar_too_costly", "response_format"),
        ("/responses", {"input": "a", "text": {"format": {"type": "json_schema", "name": "x", "schema":
         {"type": "string", "pattern": COSTLY}}}}, "grammar_too_costly", "text"),
    ],
)  # fmt: skip
def test_a_grammar_that_would_keep_the_engine_busy_is_refused_and_others_are_served(
    client: openai.OpenAI, path: str, fields: dict[str, Any], code: str, param: str | None, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.post(path, body=CHAT | fields | {"stream": stream}, cast_to=object)

    assert (caught.value.code, caught.value.param) == (code, param or "structured_outputs")
    answer: Any = client.post(
        "/chat/completions", body=CHAT | {"structured_outputs": {"choice": ["yes"]}}, cast_to=object
    )
    assert answer["choices"][0]["message"]["content"] == "yes"


def test_a_schema_that_refers_to_itself_where_there_is_an_end_is_served(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}}

    answer: Any = client.post(
        "/chat/completions", body=CHAT | {"response_format": schema_format(schema)}, cast_to=object
    )

    assert answer["choices"][0]["message"]["content"].startswith("{")


@pytest.mark.parametrize("path", ["/chat/completions", "/completions", "/responses"])
def test_an_unknown_model_is_not_found_on_every_route(client: openai.OpenAI, path: str) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.post(path, body=CHAT | {"model": "italian", "prompt": "a", "input": "a"}, cast_to=object)

    assert caught.value.code == "model_not_found"


def test_embeddings_of_a_model_that_generates_are_refused_and_not_unknown(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model=MODEL, input="the rain")

    assert caught.value.code == "task_unsupported"
    assert "/v1/embeddings" in caught.value.message


def test_a_route_that_does_not_exist_is_reported_as_such(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.images.generate(prompt="a boat")

    assert caught.value.code == "route_not_found"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b"\xff\xfe",
        b'{"model": "french", "prompt": "\xff"}',
        b'{"model": "french", "prompt": }',
    ],
)
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
    message = {"type": "message", "role": "assistant", "id": "m", "status": "completed", "content": content}
    with pytest.raises(openai.BadRequestError, match="can't read"):
        client.post("/responses", body={"model": MODEL, "input": [message], "max_output_tokens": 4}, cast_to=object)


def test_one_request_cannot_ask_for_thousands_of_answers(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="at most 128"):
        client.post("/chat/completions", body=CHAT | {"n": 129}, cast_to=object)


@pytest.mark.parametrize(
    ("path", "field"),
    [("/v1/responses", "input"), ("/v1/chat/completions", "messages"), ("/v1/completions", "prompt")],
)
def test_of_many_wrong_items_the_first_one_is_reported(server: Server, path: str, field: str) -> None:
    """All of them are kilobytes each in the answer, and many times that in the engine's memory."""
    wrong = {"/v1/completions": None}.get(path, "a")
    answer = httpx.post(server.url + path, json={"model": MODEL, field: [wrong] * 20_000}, timeout=60)

    assert answer.status_code == 400
    assert answer.json()["error"]["message"]
    assert len(answer.content) < 50_000
