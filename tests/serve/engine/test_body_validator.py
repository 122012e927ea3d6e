"""Every field of every body with null or a value of a wrong type, in vLLM's own models: no answer says what Python says
of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError, model_validator
from vllm.entrypoints.anthropic.protocol import AnthropicCountTokensRequest, AnthropicMessagesRequest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.pooling.embed.protocol import EmbeddingRequest
from vllm.entrypoints.serve.tokenize.protocol import DetokenizeRequest, TokenizeRequest
from vllm.exceptions import VLLMError

from serve.engine.api_errors import engine_error, fault_of
from serve.engine.body_validator import BodyValidator, with_fail_fast, without_functions
from serve.engine.fastapi_patches import described_error

MESSAGES = [{"role": "user", "content": "hi"}]
BODIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "/v1/chat/completions": (ChatCompletionRequest, {"messages": MESSAGES}),
    "/v1/completions": (CompletionRequest, {"prompt": "hi"}),
    "/v1/responses": (ResponsesRequest, {"input": "hi"}),
    "/v1/messages": (AnthropicMessagesRequest, {"model": "m", "max_tokens": 4, "messages": MESSAGES}),
    "/v1/messages/count_tokens": (AnthropicCountTokensRequest, {"model": "m", "messages": MESSAGES}),
    "/v1/embeddings": (EmbeddingRequest, {"input": "hi"}),
    "/v1/embeddings of a chat": (EmbeddingRequest, {"messages": MESSAGES}),
    "/tokenize": (TokenizeRequest, {"prompt": "hi"}),
    "/tokenize of a chat": (TokenizeRequest, {"messages": MESSAGES}),
    "/detokenize": (DetokenizeRequest, {"tokens": [1]}),
}
WRONG: tuple[Any, ...] = (
    None, 7, -1, 1.5, True, "secret", [], [None], [7], ["secret"], [[]], [{}], {}, {"secret": None}, {"type": None},
    {"type": "json_schema", "json_schema": 7}, [{"role": None, "content": None}], [{"role": "user", "content": [None]}],
    [{"type": "function", "function": None}], [{"role": "assistant", "tool_calls": 7}],
)  # fmt: skip
OF_PYTHON = ("NoneType", "object is not", "has no attribute", "unexpected keyword", "KeyError", "indices must be")


def validator_of(model: Any) -> BodyValidator:
    adapter: TypeAdapter[Any] = TypeAdapter(model)
    return BodyValidator(adapter.core_schema, adapter._config)  # type: ignore[attr-defined]


def names_of(schema: Any) -> set[str]:
    """The fields of all models at the top of a schema."""
    parts = (*schema.get("anyOf", ()), *schema.get("oneOf", ()))
    models = [schema["$defs"][part["$ref"].rpartition("/")[2]] for part in parts] or [schema]
    return {name for model in models for name in model["properties"]}


class Answered(NamedTuple):
    change: dict[str, Any]
    message: str


def answers(path: str) -> Iterator[Answered]:
    """For each wrong value of each field that is refused."""
    model, body = BODIES[path]
    validator = validator_of(model)
    for name in sorted(names_of(TypeAdapter(model).json_schema())):
        for wrong in WRONG:
            error: dict[str, Any]
            try:
                validator.validate_python(body | {name: wrong}, from_attributes=True)
                continue
            except ValidationError as invalid:
                located = [{**each, "loc": ("body", *each["loc"])} for each in invalid.errors(include_url=False)]
                error = described_error(located, body | {name: wrong})
            except VLLMError as refused:
                error = {"message": refused.args[0]}
            yield Answered({name: wrong}, error["message"])


@pytest.mark.parametrize("path", BODIES)
def test_no_wrong_value_of_any_field_is_answered_with_the_words_of_python(path: str) -> None:
    all_answers = list(answers(path))

    assert len(all_answers) > 10
    assert [answer for answer in all_answers if any(text in answer.message for text in OF_PYTHON)] == []


@pytest.mark.parametrize("path", BODIES)
def test_null_in_place_of_what_is_required_names_the_field_and_what_is_expected(path: str) -> None:
    model, body = BODIES[path]
    field = next(name for name in ("messages", "prompt", "input", "tokens") if name in body)
    if path == "/v1/completions":
        pytest.skip("it takes `prompt_embeds` in place of a prompt")

    with pytest.raises(ValidationError) as invalid:
        validator_of(model).validate_python(body | {field: None}, from_attributes=True)
    located = [{**each, "loc": ("body", *each["loc"])} for each in invalid.value.errors(include_url=False)]
    error = described_error(located, body | {field: None})

    assert error["param"] == field, error
    assert error["code"] == "invalid_type", error
    assert "should be a valid" in error["message"]


class Noted(BaseModel):
    """Its own validator reads the notes before their type is known."""

    notes: list[str]
    title: str = ""

    @model_validator(mode="before")
    @classmethod
    def _strip(cls, data: Any) -> Any:
        if data.get("title") == "break":
            raise TypeError("'NoneType' object is not iterable")
        return data | {"notes": [note.strip() for note in data["notes"]]}


@pytest.mark.parametrize(
    ("body", "places"),
    [
        ({"notes": None}, [("notes",)]),
        ({"notes": [7]}, [("notes", 0)]),
        ({"title": "a"}, [("notes",)]),
        ({"notes": 7, "title": 7}, [("notes",), ("title",)]),
        ([], [()]),
    ],
)
def test_what_a_models_own_validator_stumbles_over_is_located(body: Any, places: list[tuple[str | int, ...]]) -> None:
    with pytest.raises(ValidationError) as invalid:
        validator_of(Noted).validate_python(body)

    assert [error["loc"] for error in invalid.value.errors()] == places


def test_a_body_that_only_the_models_own_validator_can_not_read_is_refused_without_a_place() -> None:
    with pytest.raises(ValidationError) as invalid:
        validator_of(Noted).validate_python({"notes": ["a"], "title": "break"})

    described = described_error(invalid.value.errors())
    assert described["param"] is None
    assert "NoneType" not in described["message"]


def test_a_body_that_can_be_read_is_what_its_own_validators_make_of_it() -> None:
    assert validator_of(Noted).validate_python({"notes": [" a "]}) == Noted.model_construct(notes=["a"], title="")


@pytest.mark.parametrize("path", BODIES)
def test_the_copy_without_functions_takes_what_the_model_takes(path: str) -> None:
    model, body = BODIES[path]
    adapter: TypeAdapter[Any] = TypeAdapter(model)

    validator = BodyValidator(without_functions(adapter.core_schema), adapter._config)  # type: ignore[attr-defined]

    assert validator.validate_python(body)
    assert with_fail_fast(adapter.core_schema)


@pytest.mark.parametrize(
    "text",
    [
        "'NoneType' object is not iterable",
        "'list' object has no attribute 'get'",
        "list indices must be integers or slices, not str",
        "ChatParams.__init__() got an unexpected keyword argument 'x'",
        "render() missing 1 required positional argument: 'tools'",
        "'<' not supported between instances of 'str' and 'int'",
        "unhashable type: 'dict'",
        "object of type 'int' has no len()",
        "invalid literal for int() with base 10: 'secret'",
    ],
)
def test_what_vllm_passes_on_of_python_is_not_the_answer(text: str) -> None:
    error = engine_error(fault_of(400, b'{"error": {"message": "%s", "param": null}}' % text.encode()), {"messages"})

    assert (error.status, error.code) == (400, "invalid_request")
    assert text not in str(error)
    assert "null" in str(error)


@pytest.mark.parametrize(
    "text",
    ["`n` must be at most 128.", "The object of this tool is not a schema.", "You passed 7 tokens, at most 4 fit."],
)
def test_what_vllm_says_on_purpose_is_the_answer(text: str) -> None:
    error = engine_error(fault_of(400, b'{"error": {"message": "%s", "param": "n"}}' % text.encode()), {"n"})

    assert str(error) == text
