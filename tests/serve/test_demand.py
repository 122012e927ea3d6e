from __future__ import annotations

from typing import Any

import msgspec
import pytest

from serve.demand import Demand, demand_of
from serve.engine_call import parse_fields
from serve.errors import InvalidBody, OutputTooLong

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
CONTEXT = 1000


def demand(path: str, max_output: int | None = None, budget: int | None = None, **fields: Any) -> Demand:
    body = msgspec.json.encode(fields)
    return demand_of(path, parse_fields(body), 100, CONTEXT, max_output, budget)


PROMPT = 100 // 2 + 64


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
    assert demand(path, **fields) == Demand(PROMPT + output, {})


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize", "/v1/messages/count_tokens"])
def test_what_no_engine_runs_for_uses_nothing(path: str) -> None:
    assert demand(path, prompt="text").tokens == 0


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
    assert demand(path, max_output=50).added == {added: 50}
    assert demand(path, max_output=50, budget=PROMPT + 20) == Demand(PROMPT + 20, {added: 20})
    assert demand(path, budget=10**9).added == {}, "the context is enough of a limit"


@pytest.mark.parametrize("number", [51, "51", 51.0, 10**19])
def test_who_asks_for_more_than_the_most_is_told(number: object) -> None:
    with pytest.raises(OutputTooLong) as told:
        demand(CHAT, max_output=50, max_tokens=number)

    assert told.value.param == "max_tokens"
    assert demand(CHAT, max_output=50, max_tokens=50).added == {}


@pytest.mark.parametrize("number", ["many", [1], {"a": 1}, "1e9999"])
def test_what_is_no_number_is_told(number: object) -> None:
    with pytest.raises(InvalidBody):
        demand(CHAT, max_output=50, max_tokens=number)


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
