"""Passes the messages of a response on to the caller. Only this module replaces, records or captures them.

The steps, in the order of the messages from the engine or from another replica:

1. The start of the response. If the engine died under the request, its 500 is replaced (see `_replace`). Any other
   error of the engine is withheld until it is complete, and sent as `engine_errors` translates it. The start of a
   stream is withheld until the engine has generated something: vLLM begins every stream with 200, and an error that
   comes before any output gets its own status instead. The headers `x-graft-model` and those of the caller's limits are
   added. The request's record notes the status.
2. The body up to its first byte. The record notes the time: it is the time to the first token.
3. The body between its first byte and its last message. There is a message for each token, so nothing is done here,
   and no coroutine is made: the message goes straight to `send`. Only a response that will be compared with that of a
   shadow is captured, and of a stream with numbered events the latest is noted.
4. The last message. The engine slot is released and the used tokens are settled before it is sent, because the
   caller's next request may arrive right after it. The disconnect watcher is informed that the response is
   complete, because uvicorn reports the end of a response as a disconnect, too.

`send` is what SlowClientGuard returned, so a caller that stops reading is detected in all four steps.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Collection, Sequence

from starlette.types import Message, Send

from serve.adapters.canary import RequestOutcome
from serve.engine.api_errors import EngineFault, engine_error, fault_of
from serve.engine.protocol import Engine
from serve.engine.token_counter import Tokens
from serve.errors import EngineUnavailable, ServeError
from serve.gateway.disconnect import DisconnectWatcher
from serve.gateway.public_routes import error_event, error_response
from serve.observability.request_record import RequestRecord, is_stream

Header = tuple[bytes, bytes]

_MAX_CAPTURED_BYTES = 1 << 20
_NUMBERED_ROUTE = "/v1/responses"
_EVENT_NUMBER = re.compile(rb'"sequence_number": ?(\d+)')
_COMMENT = b":"  # of a stream that is kept alive; whoever asks vLLM for that wants to see it before the first token
# A replica exits in less than this time after its engine died. The proxy then retries on another replica every request
# that got no response yet. A quick 503 instead would make the dead replica look like the least loaded one.
_REPLICA_EXIT_S = 2.0


class CapturedBody:
    """A response body that is kept for a comparison, as long as it isn't larger than 1 MiB."""

    def __init__(self) -> None:
        self._content: bytearray | None = bytearray()

    def append(self, chunk: bytes) -> None:
        if self._content is not None:
            self._content += chunk
            if len(self._content) > _MAX_CAPTURED_BYTES:
                self._content = None

    def of_success(self, record: RequestRecord) -> bytes | None:
        """The body of a response with status 200; None for any other one, or one that is too large."""
        return bytes(self._content) if self._content is not None and record.status == 200 else None


class ResponsePipeline:
    """Passes one response on, in the steps that the docstring of this module lists."""

    def __init__(
        self,
        send: Send,
        record: RequestRecord,
        client: DisconnectWatcher,
        *,
        headers: Sequence[Header] = (),
        engine: Engine | None = None,
        tokens: Tokens | None = None,
        fields: Collection[str] = (),
        before_last: Callable[[], Awaitable[None]] | None = None,
        capture: CapturedBody | None = None,
    ) -> None:
        """`engine`: the one that answers, whose death turns a 500 into a 503; `tokens`: what it generates for this
        request; `fields`: those of the request; `before_last` runs before the last message is sent."""
        self._send = send
        # Only an error at the end of a stream of this route needs the number of the event before it.
        is_numbered = record.route == _NUMBERED_ROUTE
        self._send_between = self._note_and_send if capture is not None or is_numbered else send
        self._latest = b""
        self._record = record
        self._client = client
        self._headers = headers
        self._engine = engine
        self._tokens = tokens or Tokens()
        self._fields = fields
        self._withheld: list[Message] = []  # the start, and the body after it
        self._is_ended = False
        self._before_last = before_last
        self._capture = capture
        self._is_between = False
        self.is_replaced = False  # by a 503, because the engine died

    def send(self, message: Message) -> Awaitable[None]:
        """The ASGI `send` for the engine or the replica that answers."""
        if self._is_between and message.get("more_body"):
            return self._send_between(message)
        if self._is_ended:
            return _drop()
        starts = message["type"] == "http.response.start"
        if self.is_replaced or (starts and self._is_of_dead_engine(message["status"])):
            return self._replace()
        if self._withheld or (starts and self._is_withheld(message)):
            return self._withhold(message)
        return self._send_start(message) if starts else self._send_body(message)

    async def send_fault(self) -> bool:
        """Sends the error that kept the engine from generating anything, if there is one and nothing was sent yet.
        Returns whether the response is complete."""
        if self._withheld and self._tokens.fault and not self._is_ended:
            await self._send_fault(self._tokens.fault)
        return self._is_ended

    def end(self) -> None:
        """From now on nothing that the engine sends is passed on."""
        self._is_ended, self._is_between = True, False

    async def end_with(self, error: ServeError) -> None:
        """Ends the response with an error: as its status, or as the last event of a stream that has begun."""
        self.end()
        if self._record.status == 0:
            self._record.failed(error.code, error.status)
            await self._send_error(error)
        elif self._record.streamed:
            self._record.error = error.code
            event = error_event(error, self._record.route, _number_after(self._latest))
            await self._send_body({"type": "http.response.body", "body": event})

    def _is_of_dead_engine(self, status: int) -> bool:
        return self._engine is not None and status >= 500 and self._engine.is_dead

    def _is_withheld(self, start: Message) -> bool:
        if self._engine is None:  # another replica answers, and has translated its errors
            return False
        return bool(start["status"] >= 400) or is_stream(start.get("headers", ()))

    async def _withhold(self, message: Message) -> None:
        self._withheld.append(message)
        status, is_last = self._withheld[0]["status"], not message.get("more_body") and len(self._withheld) > 1
        body = message.get("body", b"")
        if status >= 400:
            if is_last:
                content = b"".join(part.get("body", b"") for part in self._withheld)
                await self._send_fault(self._named_fault() or fault_of(status, content))
        elif self._tokens.fault is not None:
            await self._send_fault(self._tokens.fault)
        elif self._tokens.has_output or is_last or body.startswith(_COMMENT):
            withheld, self._withheld = self._withheld, []
            for part in withheld:
                await (self._send_body(part) if "body" in part else self._send_start(part))

    def _named_fault(self) -> EngineFault | None:
        """What kept the engine from generating anything, if that has a code of Graft's, which vLLM doesn't repeat."""
        fault = self._tokens.fault
        return fault if fault and isinstance(fault.error.get("code"), str) else None

    async def _send_fault(self, fault: EngineFault) -> None:
        if self._is_of_dead_engine(fault.status):
            await self._replace()
        else:
            self.end()  # vLLM ends a stream with further messages after an error
            await self._send_error(engine_error(fault, self._fields))

    async def _send_error(self, error: ServeError) -> None:
        response = error_response(error, self._record.route)
        headers = response.raw_headers
        await self._send_start({"type": "http.response.start", "status": response.status_code, "headers": headers})
        await self._send_body({"type": "http.response.body", "body": response.body})

    async def _replace(self) -> None:
        """Holds a 500 back until the replica should have exited, and sends a 503 if it hasn't."""
        if not self.is_replaced:
            self.is_replaced = True
            await wait_for_replica_exit()
            await self._send_error(EngineUnavailable())

    def _send_start(self, message: Message) -> Awaitable[None]:
        headers = [*message.get("headers", ()), *self._headers]
        self._record.response_started(message["status"], headers)
        return self._send({**message, "headers": headers})

    def _send_body(self, message: Message) -> Awaitable[None]:
        """For every message up to the first byte, and for the last one."""
        chunk = message.get("body", b"")
        self._is_between = bool(chunk) and bool(message.get("more_body"))
        if chunk:
            self._record.first_byte_sent()
        self._latest = chunk
        if self._capture is not None:
            self._capture.append(chunk)
        return self._send(message) if message.get("more_body") else self._send_last(message)

    async def _send_last(self, message: Message) -> None:
        if self._before_last:
            await self._before_last()
        self._client.response_complete()
        await self._send(message)

    def _note_and_send(self, message: Message) -> Awaitable[None]:
        self._latest = message.get("body", b"")
        if self._capture is not None:
            self._capture.append(self._latest)
        return self._send(message)


async def _drop() -> None:
    """The `send` of a message that nobody gets."""


def _number_after(chunk: bytes) -> int:
    """The number of the event after the last one of a chunk of `/v1/responses`."""
    numbers = _EVENT_NUMBER.findall(chunk)
    return int(numbers[-1]) + 1 if numbers else 0


def outcome_of(record: RequestRecord, *, failed: bool = False) -> RequestOutcome:
    """The outcome of a request, by which its revision is judged. `failed`: the request raised an error."""
    now_s = time.monotonic()
    started_s = now_s if record.running_s is None else record.running_s
    first_byte_s = (now_s if record.first_s is None else record.first_s) - started_s
    return RequestOutcome(now_s, failed or record.status >= 500, first_byte_s)


async def wait_for_replica_exit() -> None:
    """Delays the response of a replica whose engine is dead, and that should exit meanwhile."""
    await asyncio.sleep(_REPLICA_EXIT_S)
