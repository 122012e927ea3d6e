"""What happens to the messages of a response on their way to the caller."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable
from typing import Any

import pytest
from starlette.types import Message

from serve.engine.api_errors import ENGINE_CODES, EngineFault
from serve.engine.token_counter import Tokens
from serve.gateway import response as response_module
from serve.gateway.disconnect import DisconnectWatcher
from serve.gateway.response import CapturedBody, ResponsePipeline, outcome_of
from serve.observability.request_record import RequestRecord
from tests.serve.fakes import FakeEngine

START: Message = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}
FAILED: Message = {"type": "http.response.start", "status": 500, "headers": []}


def body(content: bytes, *, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": content, "more_body": more}


class Caller:
    """Gets a response; `sent` are its messages, and what else happened in between."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.awaitables: list[Awaitable[None]] = []
        self.record = RequestRecord("1", "/v1/completions")
        self.client = DisconnectWatcher(self._receive)

    def send(self, message: Message) -> Awaitable[None]:
        self.awaitables.append(self._send(message))
        return self.awaitables[-1]

    def pipeline(self, **options: Any) -> ResponsePipeline:
        return ResponsePipeline(self.send, self.record, self.client, **options)

    async def _send(self, message: Message) -> None:
        self.sent.append(message)

    async def _receive(self) -> Message:
        return {"type": "http.disconnect"}


async def send_all(pipeline: ResponsePipeline, *messages: Message) -> None:
    for message in messages:
        await pipeline.send(message)


async def test_headers_are_added_after_those_of_the_engine_and_the_record_knows_the_status() -> None:
    caller = Caller()

    await caller.pipeline(headers=[(b"x-graft-model", b"m")]).send(START)

    assert caller.sent == [{**START, "headers": [*START["headers"], (b"x-graft-model", b"m")]}]
    assert (caller.record.status, caller.record.streamed, caller.record.first_s) == (200, True, None)


async def test_a_message_between_the_first_byte_and_the_last_message_costs_no_coroutine() -> None:
    caller = Caller()
    pipeline = caller.pipeline(headers=[(b"x-graft-model", b"m")])
    await send_all(pipeline, START, body(b""), body(b"first"))
    first_s = caller.record.first_s
    token = body(b"token")

    awaitable = pipeline.send(token)
    await awaitable

    assert awaitable is caller.awaitables[-1]
    assert caller.sent[-1] is token
    assert caller.record.first_s == first_s is not None


async def test_the_request_is_settled_before_its_last_message_and_once() -> None:
    caller = Caller()

    async def settle() -> None:
        caller.sent.append("settled")

    await send_all(caller.pipeline(before_last=settle), START, body(b"a"), body(b"b"), body(b"", more=False))

    assert [message if message == "settled" else message["type"] for message in caller.sent] == [
        *("http.response.start", "http.response.body", "http.response.body"),
        *("settled", "http.response.body"),
    ]


async def test_a_disconnect_after_the_last_message_is_not_one_of_an_unanswered_request() -> None:
    caller = Caller()
    await send_all(caller.pipeline(), START, body(b"all", more=False))

    assert await caller.client.receive() == {"type": "http.disconnect"}

    assert not caller.client.is_disconnected


async def test_a_500_of_a_dead_engine_is_replaced_and_nothing_of_it_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(response_module, "_REPLICA_EXIT_S", 0.0)
    caller, engine = Caller(), FakeEngine()
    engine.is_dead = True
    pipeline = caller.pipeline(engine=engine)

    await send_all(pipeline, FAILED, body(b"secret"), body(b"secret"), body(b"", more=False))

    assert pipeline.is_replaced
    assert [message.get("status") for message in caller.sent] == [503, None]
    assert b"secret" not in caller.sent[1]["body"]
    assert outcome_of(caller.record).failed


async def test_a_500_of_an_engine_that_is_alive_is_sent() -> None:
    caller = Caller()

    await send_all(caller.pipeline(engine=FakeEngine()), FAILED, body(b"why", more=False))

    assert [message.get("status") for message in caller.sent] == [500, None]


@pytest.mark.parametrize(
    ("start", "chunks", "captured"),
    [
        (START, [b"ab", b"", b"cd", b"e"], b"abcde"),
        (START, [b"x" * (1 << 20), b"x"], None),
        (FAILED, [b"error"], None),
    ],
    ids=["whole", "too large", "no success"],
)
async def test_a_successful_body_is_captured(start: Message, chunks: list[bytes], captured: bytes | None) -> None:
    caller, capture = Caller(), CapturedBody()

    await send_all(caller.pipeline(capture=capture), start, *map(body, chunks), body(b"", more=False))

    assert capture.of_success(caller.record) == captured
    assert b"".join(message["body"] for message in caller.sent[1:]) == b"".join(chunks)


async def test_the_outcome_has_the_time_from_the_start_to_the_first_byte() -> None:
    caller = Caller()
    caller.record.started()
    await asyncio.sleep(0.01)
    await send_all(caller.pipeline(), START, body(b"first"))
    outcome = outcome_of(caller.record)
    await asyncio.sleep(0.01)

    assert outcome_of(caller.record).first_byte_s == outcome.first_byte_s >= 0.01
    assert not outcome.failed
    assert outcome_of(caller.record, failed=True).failed


async def test_a_stream_begins_with_the_first_output_of_the_engine() -> None:
    caller, tokens = Caller(), Tokens()
    pipeline = caller.pipeline(engine=FakeEngine(), tokens=tokens)

    await send_all(pipeline, START, body(b"event: response.created"))
    assert caller.sent == []

    tokens.has_output = True
    await send_all(pipeline, body(b"first"), body(b"", more=False))

    assert [message.get("body") for message in caller.sent] == [None, b"event: response.created", b"first", b""]


@pytest.mark.parametrize("last", [body(b": keep-alive"), body(b"", more=False)], ids=["kept alive", "empty"])
async def test_a_stream_without_output_begins_with_a_comment_or_its_end(last: Message) -> None:
    caller = Caller()

    await send_all(caller.pipeline(engine=FakeEngine(), tokens=Tokens()), START, last)

    assert [message.get("status") for message in caller.sent] == [200, None]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/messages"])
async def test_an_error_before_the_first_token_of_a_stream_is_a_status(path: str) -> None:
    caller, tokens = Caller(), Tokens()
    caller.record.route = path
    pipeline = caller.pipeline(engine=FakeEngine(), tokens=tokens, fields={"messages"})

    await pipeline.send(START)
    tokens.fault = EngineFault(400, {"message": "This model's maximum context length is 8 tokens.", "code": 400})
    await send_all(pipeline, body(b"data: {}"), body(b"data: [DONE]"), body(b"", more=False))

    start, answer = caller.sent
    error = json.loads(answer["body"])["error"]
    assert (start["status"], error["code"], error["type"]) == (400, "context_length_exceeded", "invalid_request_error")
    assert not answer.get("more_body")
    assert not caller.record.streamed


async def test_an_error_that_ends_the_engines_application_before_the_first_token_is_sent_too() -> None:
    caller, tokens = Caller(), Tokens()
    pipeline = caller.pipeline(engine=FakeEngine(), tokens=tokens)
    await send_all(pipeline, START, body(b"event: response.created"))
    assert not await pipeline.send_fault()

    tokens.fault = EngineFault(400, {"message": "no"})

    assert await pipeline.send_fault()
    assert [message.get("status") for message in caller.sent] == [400, None]


@pytest.mark.parametrize(
    ("status", "content", "expected"),
    [
        (400, {"message": "must be positive", "type": "BadRequestError", "param": "n", "code": 400},
         ("invalid_request_error", "invalid_value", "n", "must be positive")),
        (400, {"message": "too long: exceeds the max_model_len 8", "param": "input", "code": 400},
         ("invalid_request_error", "context_length_exceeded", "prompt", "too long: exceeds the max_model_len 8")),
        (400, {"message": "Grammar error: no", "param": None, "code": 400},
         ("invalid_request_error", "invalid_value", "response_format", "Grammar error: no")),
        (400, {"message": "Missing.", "param": "a", "code": "missing_required_parameter"},
         ("invalid_request_error", "missing_required_parameter", "a", "Missing.")),
        (404, {"message": "No such response.", "param": None, "code": 404},
         ("invalid_request_error", "not_found", None, "No such response.")),
        (503, {"message": "busy", "param": None, "code": 503},
         ("service_unavailable", "engine_unavailable", None, "busy")),
        (500, {"message": "secret", "param": None, "code": 500},
         ("server_error", "server_error", None, "The engine had an error while processing the request.")),
    ],
)  # fmt: skip
async def test_errors_of_the_engine_have_openais_types_and_codes(
    status: int, content: dict[str, Any], expected: tuple[str | None, ...]
) -> None:
    caller = Caller()
    start = {**FAILED, "status": status, "headers": [(b"content-length", b"7")]}
    whole = json.dumps({"error": content}).encode()

    pipeline = caller.pipeline(engine=FakeEngine(), fields={"prompt", "response_format"})
    await send_all(pipeline, start, body(whole[:5]), body(whole[5:], more=False))

    error = json.loads(caller.sent[1]["body"])["error"]
    assert caller.sent[0]["status"] == status
    assert tuple(error[name] for name in ("type", "code", "param", "message")) == expected
    assert error["code"] in ENGINE_CODES | {"server_error", "engine_unavailable"}
    assert dict(caller.sent[0]["headers"])[b"content-length"] == str(len(caller.sent[1]["body"])).encode()


async def test_a_code_of_grafts_own_is_kept_where_vllm_answers_the_error() -> None:
    caller = Caller()
    pipeline = caller.pipeline(engine=FakeEngine(), tokens=(tokens := Tokens()), fields={"response_format"})
    tokens.fault = EngineFault(400, {"message": "Too costly.", "param": "grammar", "code": "grammar_too_costly"})

    answer = json.dumps({"error": {"message": "Too costly.", "param": "grammar", "code": 400}}).encode()
    await send_all(pipeline, {**FAILED, "status": 400}, body(answer, more=False))

    error = json.loads(caller.sent[1]["body"])["error"]
    assert (error["code"], error["param"]) == ("grammar_too_costly", "response_format")


@pytest.mark.parametrize(
    "content", [b'{"detail": "There was an error"}', b"not json", b"[]", b'{"error": "There was"}']
)
async def test_an_error_in_any_other_form_becomes_one_of_the_api(content: bytes) -> None:
    caller = Caller()

    await send_all(caller.pipeline(engine=FakeEngine()), {**FAILED, "status": 400}, body(content, more=False))

    error = json.loads(caller.sent[1]["body"])["error"]
    assert (error["code"], error["type"]) == ("invalid_request", "invalid_request_error")
    assert error["message"]
