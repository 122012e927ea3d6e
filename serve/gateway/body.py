"""Request bodies: read whole within their limits, and parsed as far as the gateway needs to."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
from starlette.types import Message, Receive, Scope

from serve.errors import BodyBudgetFull, BodyTooLarge, BodyTooSlow, InvalidBody, ToolUnsupported

# The top level of a body. Only `model` is ever decoded: every other value reaches the engine byte for byte.
Fields = dict[str, Any]

_fields_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])
_model_decoder = msgspec.json.Decoder(str | None)

_DIGITS_OF_64_BITS = 20
_ESCAPE = re.compile(rb"\\(?:u([0-9a-fA-F]{4})|.)", re.DOTALL)
_HIGH_SURROGATES, _LOW_SURROGATES = range(0xD800, 0xDC00), range(0xDC00, 0xE000)
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_TOOLS_OF_CLIENTS = frozenset({"function", "custom", "namespace"})
_OFF = frozenset({b"null", b"false"})
# Most requests are smaller. Larger ones leave a quarter of the budget to them.
_SMALL_BODY_BYTES = 256 << 10
_LARGE_BODIES_SHARE = 0.75
_BUDGET_WAIT_S = 0.5


@dataclass(eq=False)
class _Waiter:
    size_bytes: int
    was_granted: asyncio.Event = field(default_factory=asyncio.Event)


class BodyBudget:
    """Limits the bytes of all request bodies that this process holds. Bytes are charged before they are read. A body
    whose bytes don't fit waits for at most half a second.

    Small bodies can use the whole budget, and larger ones a part of it. So a small body never waits for large ones to
    end, however slowly they arrive or run."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.held_bytes = 0
        self._limits = {True: limit_bytes, False: int(limit_bytes * _LARGE_BODIES_SHARE)}  # by whether a body is small
        self._waiting: dict[bool, deque[_Waiter]] = {True: deque(), False: deque()}  # served in this order

    @contextlib.contextmanager
    def charge(self) -> Iterator[Charge]:
        """The bytes of one request, which are free when the context ends."""
        charge = Charge(self)
        try:
            yield charge
        finally:
            self._release(charge.size_bytes)

    async def take(self, size_bytes: int, *, is_small: bool) -> None:
        """Raises BodyBudgetFull if the bytes don't fit in time."""
        waiting = self._waiting[is_small]
        if not waiting and self._fits(size_bytes, is_small):
            self.held_bytes += size_bytes
            return
        waiter = _Waiter(size_bytes)
        waiting.append(waiter)
        try:
            async with asyncio.timeout(_BUDGET_WAIT_S):
                await waiter.was_granted.wait()
        except BaseException as error:
            if waiter in waiting:
                waiting.remove(waiter)  # those behind it get their turn when its charge ends
            else:  # granted and cancelled in the same turn of the event loop
                self._release(size_bytes)
            if isinstance(error, TimeoutError):
                raise BodyBudgetFull(self.limit_bytes) from None
            raise

    def _release(self, size_bytes: int) -> None:
        self.held_bytes -= size_bytes
        self._grant()

    def _grant(self) -> None:
        for is_small, waiting in self._waiting.items():
            while waiting and self._fits(waiting[0].size_bytes, is_small):
                waiter = waiting.popleft()
                self.held_bytes += waiter.size_bytes
                waiter.was_granted.set()

    def _fits(self, size_bytes: int, is_small: bool) -> bool:
        return self.held_bytes + size_bytes <= self._limits[is_small]


@dataclass
class Charge:
    """What one request holds of a budget."""

    _budget: BodyBudget
    size_bytes: int = 0

    async def raise_to(self, size_bytes: int) -> None:
        """Does nothing if it holds as much. Raises BodyBudgetFull."""
        if size_bytes > self.size_bytes:
            await self._budget.take(size_bytes - self.size_bytes, is_small=size_bytes <= _SMALL_BODY_BYTES)
            self.size_bytes = size_bytes


@dataclass
class LimitedReceive:
    """The ASGI `receive` of a request whose body is limited. The first call raises BodyTooLarge or BodyBudgetFull if
    the announced length is too much. Any call raises BodyTooLarge as soon as the limit is passed, BodyBudgetFull, and
    BodyTooSlow if the body isn't complete `timeout_s` after the first call."""

    receive: Receive
    announced_bytes: int  # 0 if the length isn't known
    charge: Charge
    limit_bytes: int
    timeout_s: float
    _received_bytes: int = 0
    _deadline_s: float | None = None
    _is_complete: bool = False

    async def __call__(self) -> Message:
        if self._is_complete:
            return await self.receive()
        if self._deadline_s is None:
            await self._admit(self.announced_bytes)
            self._deadline_s = asyncio.get_running_loop().time() + self.timeout_s
        try:
            async with asyncio.timeout_at(self._deadline_s):
                message = await self.receive()
        except TimeoutError:
            raise BodyTooSlow(self.timeout_s) from None
        self._received_bytes += len(message.get("body", b""))
        await self._admit(self._received_bytes)
        self._is_complete = not message.get("more_body")
        return message

    async def _admit(self, size_bytes: int) -> None:
        if size_bytes > self.limit_bytes:
            raise BodyTooLarge(self.limit_bytes)
        await self.charge.raise_to(size_bytes)


async def read_body(receive: Receive) -> bytes:
    """The whole request body. Raises what a LimitedReceive raises, and CancelledError if the client disconnects."""
    chunks: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise asyncio.CancelledError
        chunks.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(chunks)


def announced_length(scope: Scope) -> int:
    """The Content-Length of a request; 0 if there is none."""
    length = next((value for name, value in scope["headers"] if name == b"content-length"), b"")
    return int(length) if length.isdigit() else 0


def parse_fields(body: bytes) -> Fields:
    """The top level of a JSON object, values undecoded. Raises InvalidBody."""
    try:
        body.decode()  # the decoder doesn't check the bytes of values that it leaves undecoded
        fields = _fields_decoder.decode(body.removeprefix(_BYTE_ORDER_MARK))
    except UnicodeDecodeError as error:
        raise InvalidBody(f"The request body must be JSON in UTF-8: byte {error.start} is not.") from None
    except msgspec.ValidationError as error:
        raise InvalidBody(f"The request body must be a JSON object. {error}.") from None
    except msgspec.DecodeError as error:
        raise InvalidBody(
            f"The request body must be a JSON object, and is not valid JSON: {_fault(body, error)}."
        ) from None
    except RecursionError:
        raise InvalidBody("The request body is nested too deeply.") from None
    if "" in fields:
        raise InvalidBody("The request body has a field without a name.")
    for name, value in fields.items():
        if _exceeds_64_bits(memoryview(value)):
            raise InvalidBody(f"`{name}` is a number of more than 64 bits.")
    return fields


def _fault(body: bytes, error: msgspec.DecodeError) -> str:
    """What makes a body no JSON. The decoder takes half of a surrogate pair at the end of a text for the body's end."""
    if not body:
        return "it is empty"
    if lone := _lone_surrogate(body):
        return f"{lone.decode()} is half of a surrogate pair, and no character without the other half"
    return str(error)


def _lone_surrogate(body: bytes) -> bytes | None:
    """The first escape sequence of a surrogate without its other half."""
    is_high, last, end = False, b"", -1
    for match in _ESCAPE.finditer(body):
        code = int(match[1], 16) if match[1] else 0
        if is_high and not (match.start() == end and code in _LOW_SURROGATES):
            return last
        if not is_high and code in _LOW_SURROGATES:
            return match[0]
        is_high, last, end = code in _HIGH_SURROGATES, match[0], match.end()
    return last if is_high else None


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
