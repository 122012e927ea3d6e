"""What the official openai client asks for, it gets: whole and streaming, with every extra of the protocol."""

from __future__ import annotations

import json
import re
from typing import Any

import openai
import pytest

from tests.e2e.api.conftest import MODEL
from tests.e2e.conftest import Server

CHAT: dict[str, Any] = {
    "model": MODEL, "messages": [{"role": "user", "content": "the rain"}], "max_tokens": 12, "temperature": 0,
}  # fmt: skip
TEXT: dict[str, Any] = {"model": MODEL, "prompt": "the rain in", "max_tokens": 12, "temperature": 0}
# Bounded everywhere, so that a model of random weights must come to an end.
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Paris", "Rome"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {"name": "book", "description": "Book a trip.", "parameters": SCHEMA, "strict": True},
}


def test_models_are_listed_and_shown_one_by_one(client: openai.OpenAI) -> None:
    listed = {model.id: model for model in client.models.list()}

    assert MODEL in listed
    assert client.models.retrieve(MODEL) == listed[MODEL]
    pinned = listed[MODEL].model_extra["root"]  # type: ignore[index]
    assert client.models.retrieve(pinned).id == pinned
    assert {model.model_extra["max_model_len"] for model in listed.values()} == {2048}  # type: ignore[index]
    assert listed[MODEL].model_dump()["parent"] == "tiny-llama"


def test_a_chat_answer_counts_its_tokens(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**CHAT, extra_body={"ignore_eos": True})

    assert answer.object == "chat.completion"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12


@pytest.mark.parametrize("every_chunk", [False, True])
def test_a_chat_stream_ends_with_the_usage_that_was_asked_for(client: openai.OpenAI, every_chunk: bool) -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": every_chunk}
    unstreamed = client.chat.completions.create(**CHAT)
    chunks = list(client.chat.completions.create(**CHAT, stream=True, stream_options=options))

    assert chunks[-1].choices == []
    assert chunks[-1].usage == unstreamed.usage
    assert all((chunk.usage is not None) == every_chunk for chunk in chunks[:-1])
    assert (
        "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == unstreamed.choices[0].message.content
    )


def test_a_completion_streams_what_it_would_answer_whole(client: openai.OpenAI) -> None:
    unstreamed = client.completions.create(**TEXT)
    chunks = list(client.completions.create(**TEXT, stream=True))

    assert "".join(chunk.choices[0].text for chunk in chunks) == unstreamed.choices[0].text
    assert chunks[-1].choices[0].finish_reason == unstreamed.choices[0].finish_reason


def test_several_prompts_are_answered_in_their_order(client: openai.OpenAI) -> None:
    prompts = ["the rain", "in spain", "stays"]
    together = client.completions.create(**TEXT | {"prompt": prompts})

    assert [choice.index for choice in together.choices] == [0, 1, 2]
    assert together.choices[1].text == client.completions.create(**TEXT | {"prompt": prompts[1]}).choices[0].text


def test_logprobs_are_those_of_the_tokens_that_were_said(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**CHAT, logprobs=True, top_logprobs=3)

    assert answer.choices[0].logprobs is not None
    tokens = answer.choices[0].logprobs.content or []
    assert len(tokens) == (answer.usage and answer.usage.completion_tokens)
    for token in tokens:
        assert len(token.top_logprobs) == 3
        assert token.logprob == max(candidate.logprob for candidate in token.top_logprobs)  # greedy: the best was taken


def test_n_answers_are_given_and_a_seed_repeats_them(client: openai.OpenAI) -> None:
    request = CHAT | {"temperature": 1.0, "n": 3, "seed": 11}
    first, second = (client.chat.completions.create(**request) for _ in range(2))

    texts = [choice.message.content for choice in first.choices]
    assert len(set(texts)) > 1
    assert [choice.message.content for choice in second.choices] == texts


def test_an_answer_ends_before_a_stop_word(client: openai.OpenAI) -> None:
    text = client.completions.create(**TEXT).choices[0].text
    word = text[3:5]

    stopped = client.completions.create(**TEXT, stop=[word]).choices[0]

    assert stopped.text == text[: text.index(word)]
    assert stopped.finish_reason == "stop"


def test_structured_output_is_json_of_the_schema(client: openai.OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "trip", "schema": SCHEMA, "strict": True}}
    answer = client.chat.completions.create(**CHAT | {"max_tokens": 200}, response_format=form)

    assert answer.choices[0].finish_reason == "stop"
    trip = json.loads(answer.choices[0].message.content or "")
    assert trip["city"] in ("Paris", "Rome")
    assert 1 <= trip["days"] <= 9


def test_structured_output_streams(client: openai.OpenAI) -> None:
    extra_body: Any = {"structured_outputs": {"regex": r"[0-9]{3}-[a-f]{2}"}}
    chunks = client.chat.completions.create(**CHAT | {"max_tokens": 100}, stream=True, extra_body=extra_body)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    assert re.fullmatch(r"[0-9]{3}-[a-f]{2}", text)


def test_a_choice_is_one_of_those_that_were_offered(client: openai.OpenAI) -> None:
    extra_body = {"structured_outputs": {"choice": ["yes", "no"]}}

    assert client.completions.create(**TEXT, extra_body=extra_body).choices[0].text in ("yes", "no")


def test_a_named_tool_is_called_with_arguments_of_its_schema(client: openai.OpenAI) -> None:
    choice: Any = {"type": "function", "function": {"name": "book"}}
    answer = client.chat.completions.create(**CHAT | {"max_tokens": 200}, tools=[TOOL], tool_choice=choice)  # type: ignore[list-item]

    calls: Any = answer.choices[0].message.tool_calls
    assert [call.function.name for call in calls] == ["book"]
    assert json.loads(calls[0].function.arguments)["city"] in ("Paris", "Rome")


def test_a_named_tool_is_called_in_a_stream(client: openai.OpenAI) -> None:
    choice: Any = {"type": "function", "function": {"name": "book"}}
    request: Any = CHAT | {"max_tokens": 200, "tools": [TOOL], "tool_choice": choice, "stream": True}
    calls = [
        call for chunk in client.chat.completions.create(**request) for call in chunk.choices[0].delta.tool_calls or ()
    ]

    assert [call.function.name for call in calls if call.function.name] == ["book"]
    assert json.loads("".join(call.function.arguments or "" for call in calls))["city"] in ("Paris", "Rome")


def test_a_response_is_given_whole_and_as_events(client: openai.OpenAI) -> None:
    request: Any = {"model": MODEL, "input": "the rain", "max_output_tokens": 12, "temperature": 0}
    unstreamed = client.responses.create(**request)
    events = list(client.responses.create(**request, stream=True))

    assert unstreamed.output_text
    assert events[0].type == "response.created"
    assert events[-1].type in ("response.completed", "response.incomplete")
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == unstreamed.output_text


def test_tokenize_and_detokenize_undo_each_other(client: openai.OpenAI, server: Server) -> None:
    elsewhere = client.with_options(base_url=server.url)
    tokenized: Any = elsewhere.post("/tokenize", body={"model": MODEL, "prompt": "the rain"}, cast_to=object)
    back: Any = elsewhere.post("/detokenize", body={"model": MODEL, "tokens": tokenized["tokens"]}, cast_to=object)

    assert tokenized["count"] == len(tokenized["tokens"])
    assert back["prompt"].endswith("the rain")


async def test_the_asynchronous_client_streams_too(server: Server) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        stream = await client.chat.completions.create(**CHAT, stream=True)
        deltas = [chunk.choices[0].delta.content or "" async for chunk in stream]

    assert "".join(deltas)


def test_a_raw_answer_tells_what_answered(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(**CHAT)

    assert raw.headers["x-graft-model"] == raw.parse().model
