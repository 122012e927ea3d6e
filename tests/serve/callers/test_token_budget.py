from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from serve.callers.token_budget import TokenLimits, TokenReservation
from serve.errors import InvalidBody, OutputTooLong
from serve.gateway.body import parse_fields

CHAT, COMPLETIONS, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
CONTEXT = 1000


def reserve(path: str, max_output: int | None = None, budget: int | None = None, **fields: Any) -> TokenReservation:
    body = msgspec.json.encode(fields)
    return TokenReservation.for_request(path, parse_fields(body), PROMPT, TokenLimits(CONTEXT, max_output, budget))


PROMPT = 114


@pytest.mark.parametrize(
    ("path", "fields", "output"),
    [
        (CHAT, {"max_tokens": 10}, 10),
        (CHAT, {"max_completion_tokens": 10}, 10),
        (CHAT, {"max_tokens": 10, "max_completion_tokens": 20}, 20),
        (CHAT, {"max_tokens": 10, "n": 3}, 30),
        (CHAT, {"max_tokens": "10"}, 10),
        (CHAT, {"max_tokens": 10.0}, 10),
        (CHAT, {"max_tokens": 10**19}, CONTEXT),
        (CHAT, {"max_tokens": None, "n": None}, CONTEXT),
        (CHAT, {}, CONTEXT),
        (COMPLETIONS, {"max_tokens": 10, "prompt": "text"}, 10),
        (COMPLETIONS, {"max_tokens": 10, "prompt": [1, 2, 3]}, 10),
        (COMPLETIONS, {"max_tokens": 10, "prompt": ["a", "b", "c"]}, 30),
        (COMPLETIONS, {"max_tokens": 10, "prompt": [[1, 2], [3]], "n": 2}, 40),
        ("/v1/responses", {"max_output_tokens": 10}, 10),
        ("/v1/messages", {"max_tokens": 10}, 10),
        ("/v1/embeddings", {"input": "text"}, 0),
    ],
)
def test_what_a_request_may_use_is_its_prompt_and_all_that_it_asks_for(
    path: str, fields: dict[str, Any], output: int
) -> None:
    assert reserve(path, **fields) == TokenReservation(PROMPT + output, {})


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize", "/v1/messages/count_tokens"])
def test_what_no_engine_runs_for_uses_nothing(path: str) -> None:
    assert reserve(path, prompt="text").tokens == 0


@pytest.mark.parametrize(
    ("path", "added"),
    [
        (CHAT, "max_completion_tokens"),
        (COMPLETIONS, "max_tokens"),
        ("/v1/responses", "max_output_tokens"),
        ("/v1/messages", "max_tokens"),
    ],
)
def test_who_names_no_number_gets_the_most_that_there_is(path: str, added: str) -> None:
    assert reserve(path, max_output=50).added == {added: 50}
    assert reserve(path, max_output=50, budget=PROMPT + 20) == TokenReservation(PROMPT + 20, {added: 20})
    assert reserve(path, budget=10**9).added == {}, "the context is enough of a limit"


@pytest.mark.parametrize("number", [51, "51", 51.0, 10**19])
def test_who_asks_for_more_than_the_most_is_told(number: object) -> None:
    with pytest.raises(OutputTooLong) as caught:
        reserve(CHAT, max_output=50, max_tokens=number)

    assert caught.value.param == "max_tokens"
    assert reserve(CHAT, max_output=50, max_tokens=50).added == {}


# As they are written in a body: some are no JSON that Python could write.
NUMBERS = (
    *(b"-5", b"-1", b"-0", b"0", b"1", b"16", b"18446744073709551615", b"true", b"false", b"null", b"[1]", b"{}"),
    *(b"1.0", b"1.5", b"1e3", b"1e300", b"1e999", b"-1e999", b"9007199254740993.0"),
    *(b'"16"', b'" 16 "', b'"16.0"', b'"-5"', b'"1e3"', b'"1e9999"', b'"many"', b'""'),
)
USER = [{"role": "user", "content": "hi"}]
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": USER},
    COMPLETIONS: {"prompt": "hi"},
    RESPONSES: {"input": "hi"},
    MESSAGES: {"model": "tiny", "messages": USER, "max_tokens": 4},
}
MOST_ANSWERS = (b"18446744073709551615", b"9007199254740993.0")  # more than any engine gives, as it says itself
ECHO_ONLY = (b"-0", b"0", b"false")  # a completion with `echo` may ask for its prompt alone


def vllm_accepts(path: str, body: bytes, name: str) -> bool:
    """Whether vLLM's own models of this request take the field: first that of its body, then that of its sampling."""
    from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import SamplingParams

    models: dict[str, Any] = {
        CHAT: ChatCompletionRequest,
        COMPLETIONS: CompletionRequest,
        RESPONSES: ResponsesRequest,
        MESSAGES: AnthropicMessagesRequest,
    }
    try:
        value = getattr(models[path].model_validate(json.loads(body)), name)
        options = {} if value is None else {"n" if name == "n" else "max_tokens": value}
        SamplingParams(temperature=1, **options)
    except (ValueError, VLLMValidationError):  # the first is that of pydantic, and of a text that is no UTF-8
        return False
    return True


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (CHAT, "max_tokens"),
        (CHAT, "max_completion_tokens"),
        (CHAT, "n"),
        (COMPLETIONS, "max_tokens"),
        (COMPLETIONS, "n"),
        (RESPONSES, "max_output_tokens"),
        (MESSAGES, "max_tokens"),
    ],
)
def test_a_number_that_vllm_refuses_is_refused_and_never_reserved(path: str, name: str) -> None:
    for number in NUMBERS:
        if (name == "n" and number in MOST_ANSWERS) or (path == COMPLETIONS and number in ECHO_ONLY):
            continue
        body = json.dumps(BODIES[path])[:-1].encode() + b', "%s": %s}' % (name.encode(), number)
        is_accepted = number == b"null" or vllm_accepts(path, body, name)
        for limits in (TokenLimits(CONTEXT, None, 10**6), TokenLimits(CONTEXT, 10**30, None)):
            refused = refusal_of(path, body, limits)
            assert (refused is None) == is_accepted, number
            assert refused is None or (refused.status, refused.param) == (400, name)


def refusal_of(path: str, body: bytes, limits: TokenLimits) -> InvalidBody | None:
    try:
        reservation = TokenReservation.for_request(path, parse_fields(body), PROMPT, limits)
    except InvalidBody as error:
        return error
    assert reservation.tokens > PROMPT
    return None


def test_a_completion_may_ask_for_its_prompt_alone() -> None:
    assert reserve(COMPLETIONS, prompt="hi", echo=True, max_tokens=0).tokens == PROMPT + 1
    with pytest.raises(InvalidBody):
        reserve(COMPLETIONS, prompt="hi", n=0)


@pytest.mark.parametrize("path", [RESPONSES, MESSAGES])
def test_a_field_that_vllm_does_not_read_reserves_nothing(path: str) -> None:
    field = {RESPONSES: "max_output_tokens"}.get(path, "max_tokens")

    assert reserve(path, **{field: 10}, n=50, best_of="many").tokens == PROMPT + 10
    assert reserve(CHAT, max_tokens=10, best_of=-3).tokens == PROMPT + 10


def test_a_prompt_that_cannot_be_decoded_is_left_to_the_engine() -> None:
    fields = parse_fields(b'{"max_tokens": 10, "prompt": ["a", 1e999]}')

    reservation = TokenReservation.for_request(COMPLETIONS, fields, PROMPT, TokenLimits(CONTEXT, None, 10**6))
    assert reservation.tokens == PROMPT + 2 * 10


@pytest.mark.parametrize("number", ["18446744073709551616", "-9223372036854775809", "9" * 5000, "-" + "1" * 30])
def test_a_number_that_no_engine_can_be_told_is_refused(number: str) -> None:
    with pytest.raises(InvalidBody, match="`top_k` is a number of more than 64 bits"):
        parse_fields(f'{{"top_k": {number}}}'.encode())


def test_a_body_that_is_nested_without_end_is_refused() -> None:
    with pytest.raises(InvalidBody, match="nested too deeply"):
        parse_fields(b'{"a":' * 20_000)


@pytest.mark.parametrize(
    "value", ["18446744073709551615", "-9223372036854775808", "0.12345678901234567890123", '"9"', "1e300"]
)
def test_other_values_are_passed_on(value: str) -> None:
    assert bytes(parse_fields(f'{{"seed": {value}}}'.encode())["seed"]) == value.encode()
