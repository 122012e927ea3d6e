"""What the gateway reads of a request body. Token limits of a body are in tests/serve/callers/test_token_budget.py."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable

import httpx
import pytest
from starlette.types import Message

from serve.errors import BodyTooLarge, BodyTooSlow, InvalidBody
from serve.gateway.body import (
    BodyBudget,
    Charge,
    LimitedReceive,
    parse_fields,
    read_body,
    with_content_length,
    with_fields,
)
from tests.serve.fakes import FakeEngine


def receiving(*messages: Message) -> Callable[[], Awaitable[Message]]:
    waiting = list(messages)

    async def receive() -> Message:
        if not waiting:
            await asyncio.Event().wait()
        return waiting.pop(0)

    return receive


def limited(*messages: Message, timeout_s: float = 1) -> LimitedReceive:
    """A body of at most 3 bytes."""
    return LimitedReceive(receiving(*messages), 0, Charge(BodyBudget(100)), limit_bytes=3, timeout_s=timeout_s)


def chunk(content: bytes, *, more: bool) -> Message:
    return {"type": "http.request", "body": content, "more_body": more}


async def test_a_body_is_read_whole() -> None:
    assert await read_body(limited(chunk(b"ab", more=True), chunk(b"c", more=False))) == b"abc"


async def test_a_body_that_is_too_large_is_refused_before_its_end() -> None:
    with pytest.raises(BodyTooLarge):
        await read_body(limited(chunk(b"ab", more=True), chunk(b"cd", more=True)))


async def test_a_body_that_does_not_arrive_in_time_is_refused() -> None:
    with pytest.raises(BodyTooSlow):
        await read_body(limited(chunk(b"ab", more=True), timeout_s=0.01))


async def test_a_client_that_disconnects_cancels_the_reading() -> None:
    with pytest.raises(asyncio.CancelledError):
        await read_body(limited(chunk(b"ab", more=True), {"type": "http.disconnect"}))


def test_fields_are_added_to_a_body_and_a_body_without_more_fields_is_untouched() -> None:
    body = b'{"a":  1}'

    assert with_fields(body, parse_fields(body), {}) is body
    assert with_fields(body, parse_fields(body), {"max_tokens": 5}) == b'{"a":1,"max_tokens":5}'


def test_the_content_length_is_replaced() -> None:
    scope = {"path": "/", "headers": [(b"content-length", b"9"), (b"host", b"graft")]}

    assert with_content_length(scope, 4) == {"path": "/", "headers": [(b"host", b"graft"), (b"content-length", b"4")]}


@pytest.mark.parametrize(
    ("asked", "refused"),
    [
        ({"prompt_logprobs": 0}, True),
        ({"prompt_logprobs": None}, False),
        ({"echo": True, "logprobs": 1}, True),
        ({"echo": 1, "logprobs": 0}, True),
        ({"echo": True, "top_logprobs": 2}, True),
        ({"echo": True}, False),
        ({"echo": True, "messages": [{"role": "user", "content": "x"}]}, True),
        ({"echo": "yes", "messages": [], "top_logprobs": None}, True),
        ({"echo": False, "messages": [{"role": "user", "content": "x"}]}, False),
        ({"echo": True, "logprobs": False}, True),
        ({"echo": True, "logprobs": None}, False),
        ({"echo": False, "logprobs": 5}, False),
        ({"logprobs": True, "top_logprobs": 2}, False),
    ],
)
@pytest.mark.parametrize("model", ["small-llama", "pirate"])
async def test_what_would_stop_an_engine_with_adapters_never_reaches_it(
    client: httpx.AsyncClient, engine: FakeEngine, asked: dict[str, object], refused: bool, model: str
) -> None:
    for supports, status in ((False, 400 if refused else 200), (True, 200)):
        engine.supports_prompt_logprobs = supports

        response = await client.post("/v1/completions", json={"model": model, "prompt": "x", **asked})

        assert response.status_code == status
        if status == 400:
            assert response.json()["error"]["code"] == "prompt_logprobs_unavailable"


@pytest.mark.parametrize(
    ("tools", "param"),
    [
        ([{"type": "web_search"}], "tools[0].type"),
        ([{"type": "function", "name": "f"}, {"type": "mcp"}], "tools[1].type"),
        ([{"type": "function", "name": "f"}, {"type": "custom", "name": "c"}], None),
        ([], None),
        ("hammer", None),
        ([{"name": "f"}], None),
    ],
)
async def test_a_tool_that_the_server_would_have_to_run_is_refused_where_it_runs_none(
    client: httpx.AsyncClient, engine: FakeEngine, tools: object, param: str | None
) -> None:
    for runs, expected in ((False, param), (True, None)):
        engine.runs_tools = runs

        response = await client.post("/v1/responses", json={"model": "pirate", "input": "x", "tools": tools})

        assert response.status_code == (200 if expected is None else 400), response.text
        if expected:
            error = response.json()["error"]
            assert (error["code"], error["param"]) == ("tool_unsupported", expected)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (rb'{"prompt": "\ud800"}', r"\\ud800 is half of a surrogate pair"),
        (rb'{"prompt": "\ud83d\ude00 \uDC00 a"}', r"\\uDC00 is half of a surrogate pair"),
        (rb'{"\ud800": 1}', r"\\ud800 is half of a surrogate pair"),
        (rb'{"messages": [{"content": "\\ud800 \ud801\n"}]}', r"\\ud801 is half of a surrogate pair"),
        (b'{"prompt": "a', "not valid JSON: Input data was truncated"),
        (b'{"a": NaN}', r"not valid JSON: .*invalid character \(byte 6\)"),
        (b"", "not valid JSON: it is empty"),
        (b"[]", "must be a JSON object. Expected `object`, got `array`"),
        (b'{"": 1, "prompt": "a"}', "a field without a name"),
    ],
)
def test_a_body_that_can_not_be_read_is_told_what_is_wrong_with_it(body: bytes, said: str) -> None:
    with pytest.raises(InvalidBody, match=said):
        parse_fields(body)


def test_both_halves_of_a_surrogate_pair_and_what_only_looks_like_one_are_text() -> None:
    body = rb'{"prompt": "\ud83d\ude00 \\ud800"}'

    assert json.loads(bytes(parse_fields(body)["prompt"])) == "\U0001f600 \\ud800"
