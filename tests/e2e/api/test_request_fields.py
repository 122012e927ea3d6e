"""The request fields that vLLM documents beside OpenAI's: each is taken, and does something or is refused clearly."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.e2e.api.conftest import MODEL

TOKENS = [0, 17, 99, 140, 3, 250]
ASKED: dict[str, Any] = {"model": MODEL, "prompt": TOKENS, "max_tokens": 8, "temperature": 0}
CHAT: dict[str, Any] = {
    "model": MODEL, "messages": [{"role": "user", "content": "the rain"}], "max_tokens": 8, "temperature": 0,
}  # fmt: skip

SAMPLING = {
    "best_effort": {"top_p": 0.9, "frequency_penalty": 0.1, "presence_penalty": 0.1, "seed": 3},
    "top_k": {"top_k": 5},
    "min_p": {"min_p": 0.1},
    "repetition_penalty": {"repetition_penalty": 1.1},
    "length_penalty": {"length_penalty": 1.0},
    "stop_token_ids": {"stop_token_ids": [1]},
    "include_stop_str_in_output": {"stop": ["a"], "include_stop_str_in_output": True},
    "ignore_eos": {"ignore_eos": True},
    "min_tokens": {"min_tokens": 4},
    "skip_special_tokens": {"skip_special_tokens": False},
    "spaces_between_special_tokens": {"spaces_between_special_tokens": False},
    "truncate_prompt_tokens": {"truncate_prompt_tokens": 3},
    "allowed_token_ids": {"allowed_token_ids": [40, 41, 42]},
    "bad_words": {"bad_words": ["rain"]},
    "add_special_tokens": {"add_special_tokens": False},
    "priority": {"priority": 0},
    "request_id": {"request_id": "mine-1"},
    "return_tokens_as_token_ids": {"return_tokens_as_token_ids": True, "logprobs": 1},
    "return_token_ids": {"return_token_ids": True},
    "cache_salt": {"cache_salt": "salt"},
    "logit_bias": {"logit_bias": {"17": 5.0}},
}
OF_CHAT = {
    "continue_final_message": {"add_generation_prompt": False, "continue_final_message": True},
    "add_generation_prompt": {"add_generation_prompt": False},
    "chat_template_kwargs": {"chat_template_kwargs": {"anything": 1}},
    "documents": {"documents": [{"title": "a", "text": "b"}]},
    "max_completion_tokens": {"max_completion_tokens": 4},
    "top_logprobs": {"logprobs": True, "top_logprobs": 2},
    "parallel_tool_calls": {"parallel_tool_calls": False},
    "user": {"user": "someone"},
}


def completion(client: openai.OpenAI, fields: dict[str, Any]) -> Any:
    return client.post("/completions", body=ASKED | fields, cast_to=object)


@pytest.mark.parametrize("field", SAMPLING)
def test_a_completion_takes(client: openai.OpenAI, field: str) -> None:
    answer = completion(client, SAMPLING[field])

    assert answer["choices"][0]["finish_reason"] in ("length", "stop")


@pytest.mark.parametrize("field", OF_CHAT)
def test_a_chat_takes(client: openai.OpenAI, field: str) -> None:
    answer: Any = client.post("/chat/completions", body=CHAT | OF_CHAT[field], cast_to=object)

    assert answer["choices"][0]["finish_reason"] in ("length", "stop")


def test_only_allowed_tokens_are_said(client: openai.OpenAI) -> None:
    answer = completion(client, {"allowed_token_ids": [40, 41], "return_token_ids": True})

    assert set(answer["choices"][0]["token_ids"]) <= {40, 41}


def test_a_bias_makes_a_token_certain(client: openai.OpenAI) -> None:
    answer = completion(client, {"logit_bias": {"42": 100}, "return_token_ids": True})

    assert set(answer["choices"][0]["token_ids"]) == {42}


def test_an_echo_begins_with_the_prompt(client: openai.OpenAI) -> None:
    answer = completion(client, {"prompt": "the rain", "echo": True})

    assert "the rain" in answer["choices"][0]["text"]


@pytest.mark.parametrize("fields", [{"prompt_logprobs": 1}, {"echo": True, "logprobs": 1}])
def test_prompt_logprobs_are_refused_by_an_engine_with_adapters(client: openai.OpenAI, fields: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        completion(client, fields)

    assert refused.value.code == "prompt_logprobs_unavailable"


def test_a_chat_that_is_to_be_repeated_asks_for_the_same(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.post("/chat/completions", body=CHAT | {"echo": True}, cast_to=object)

    assert refused.value.code == "prompt_logprobs_unavailable"


def test_a_number_with_many_digits_reaches_the_engine_as_it_is(client: openai.OpenAI) -> None:
    seed = 2**63 - 1
    first, second = (completion(client, {"seed": seed, "temperature": 1.0})["choices"][0]["text"] for _ in range(2))

    assert first == second
    with pytest.raises(openai.BadRequestError, match="seed"):
        completion(client, {"seed": seed + 1})
