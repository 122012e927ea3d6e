"""What the official anthropic client asks for, it gets, errors included."""

from __future__ import annotations

from typing import Any

import anthropic
import pytest

from tests.e2e.api.conftest import MODEL

ASKED: dict[str, Any] = {
    "model": MODEL, "messages": [{"role": "user", "content": "the rain"}], "max_tokens": 12,
    "extra_body": {"temperature": 0},
}  # fmt: skip


def text_of(message: anthropic.types.Message) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def test_a_message_is_answered_and_counted(claude: anthropic.Anthropic) -> None:
    message = claude.messages.create(**ASKED)

    assert (message.type, message.role) == ("message", "assistant")
    assert text_of(message)
    assert message.stop_reason in ("max_tokens", "end_turn")
    assert 0 < message.usage.output_tokens <= 12
    assert message.model.startswith(f"{MODEL}@")


def test_a_stream_says_the_same_as_a_whole_message(claude: anthropic.Anthropic) -> None:
    with claude.messages.stream(**ASKED) as stream:
        streamed = "".join(stream.text_stream)
        final = stream.get_final_message()

    message = claude.messages.create(**ASKED)
    assert streamed == text_of(message)
    assert final.usage.output_tokens == message.usage.output_tokens


def test_tokens_are_counted_without_an_answer(claude: anthropic.Anthropic) -> None:
    counted = claude.messages.count_tokens(model=MODEL, messages=ASKED["messages"])

    assert counted.input_tokens == claude.messages.create(**ASKED).usage.input_tokens


def test_an_unknown_model_is_reported_in_anthropics_shape(claude: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError) as caught:
        claude.messages.create(**ASKED | {"model": "italian"})

    body: Any = caught.value.body
    assert body["type"] == "error"
    assert (body["error"]["type"], body["error"]["code"]) == ("not_found_error", "model_not_found")
    assert "french, german" in body["error"]["message"]


@pytest.mark.parametrize("change", [{"max_tokens": -1}, {"messages": []}, {"max_tokens": 100_000}])
def test_what_the_engine_refuses_is_a_bad_request(claude: anthropic.Anthropic, change: dict[str, Any]) -> None:
    with pytest.raises(anthropic.BadRequestError) as caught:
        claude.messages.create(**ASKED | change)

    body: Any = caught.value.body
    assert body["error"]["message"]
