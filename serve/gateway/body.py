"""Request bodies: read whole within their limits, and parsed as far as the gateway needs to."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.types import Receive, Scope

from serve.errors import BodyTooLarge, BodyTooSlow, InvalidBody, ToolUnsupported

# The top level of a body. Only `model` is ever decoded: every other value reaches the engine byte for byte.
Fields = dict[str, Any]

_fields_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])
_model_decoder = msgspec.json.Decoder(str | None)

_DIGITS_OF_64_BITS = 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_TOOLS_OF_CLIENTS = frozenset({"function", "custom", "namespace"})
_OFF = frozenset({b"null", b"false"})


async def read_body(receive: Receive, limit_bytes: int, timeout_s: float) -> bytes:
    """The whole request body. Raises BodyTooLarge as soon as the limit is passed, BodyTooSlow after `timeout_s`, and
    CancelledError if the client disconnects."""
    try:
        async with asyncio.timeout(timeout_s):
            return await _read_all(receive, limit_bytes)
    except TimeoutError:
        raise BodyTooSlow(timeout_s) from None


async def _read_all(receive: Receive, limit_bytes: int) -> bytes:
    chunks: list[bytes] = []
    size_bytes = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise asyncio.CancelledError
        chunk = message.get("body", b"")
        size_bytes += len(chunk)
        if size_bytes > limit_bytes:
            raise BodyTooLarge(limit_bytes)
        chunks.append(chunk)
        if not message.get("more_body"):
            return b"".join(chunks)


def parse_fields(body: bytes) -> Fields:
    """The top level of a JSON object, values undecoded. Raises InvalidBody."""
    try:
        body.decode()  # the decoder doesn't check the bytes of values that it leaves undecoded
        fields = _fields_decoder.decode(body.removeprefix(_BYTE_ORDER_MARK))
    except UnicodeDecodeError as error:
        raise InvalidBody(f"The request body must be JSON in UTF-8: byte {error.start} is not.") from None
    except msgspec.DecodeError:
        raise InvalidBody("The request body must be a JSON object.") from None
    except RecursionError:
        raise InvalidBody("The request body is nested too deeply.") from None
    for name, value in fields.items():
        if _exceeds_64_bits(memoryview(value)):
            raise InvalidBody(f"`{name}` is a number of more than 64 bits.")
    return fields


def _exceeds_64_bits(value: memoryview) -> bool:
    """Whether a JSON value is an integer of more than 64 bits. vLLM can't send it to its engine core: the message that
    holds the parameters of a request has no larger integers."""
    if len(value) < _DIGITS_OF_64_BITS or value[0] not in b"-0123456789":
        return False
    number = bytes(value)
    digits, maximum = (number[1:], 2**63) if number.startswith(b"-") else (number, 2**64 - 1)
    return digits.isdigit() and (len(digits) > _DIGITS_OF_64_BITS or int(digits) > maximum)


def requested_model(fields: Fields) -> str | None:
    """The `model` of a request; None, which means the base model, where it is absent. Raises InvalidBody."""
    with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError):
        return _model_decoder.decode(fields["model"]) if "model" in fields else None
    raise InvalidBody("`model` must be a string.")


class _Tool(msgspec.Struct):
    type: str


_tools_decoder = msgspec.json.Decoder(list[_Tool])


def check_tools(fields: Mapping[str, Any]) -> None:
    """Raises ToolUnsupported for a tool of `/v1/responses` that the server would have to run, such as `web_search`.
    vLLM 0.32 answers as if there were none. What is no list of tools is left to vLLM, which refuses it."""
    with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        for index, tool in enumerate(_tools_decoder.decode(fields.get("tools", b"[]"))):
            if tool.type not in _TOOLS_OF_CLIENTS:
                raise ToolUnsupported(tool.type, index)


def wants_prompt_logprobs(fields: Mapping[str, Any]) -> bool:
    """Whether a request asks for log-probabilities of its own prompt.

    With adapters, vLLM 0.32 computes these log-probabilities with the sampling positions of the batch, which are wrong
    for them. On a CPU a second request in the batch then stops the engine; on a GPU the adapter's change of the output
    layer is left out
    (https://github.com/vllm-project/vllm/issues/16668, https://github.com/vllm-project/vllm/issues/51594).
    """
    values = {
        name: bytes(fields.get(name, b"null")) for name in ("prompt_logprobs", "echo", "logprobs", "top_logprobs")
    }
    # For a chat with `echo`, vLLM takes the count from `top_logprobs`, which is 0 by default; and it computes
    # log-probabilities for a count of 0 or `false` as well.
    has_count = "messages" in fields or {values["logprobs"], values["top_logprobs"]} != {b"null"}
    return values["prompt_logprobs"] != b"null" or (values["echo"] not in _OFF and has_count)


def with_fields(body: bytes, fields: Fields, added: Mapping[str, Any]) -> bytes:
    """`body`, whose fields are `fields`, with the `added` fields. `body` itself if there are none."""
    return msgspec.json.encode(fields | dict(added)) if added else body


def with_content_length(scope: Scope, length_bytes: int) -> Scope:
    """The scope of the same request with a body of another length."""
    headers = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
    return {**scope, "headers": [*headers, (b"content-length", str(length_bytes).encode())]}
