"""What is known of one request while it passes through: for metrics, the access log and the trace."""

from __future__ import annotations

import time
import uuid
from collections.abc import Awaitable
from dataclasses import dataclass, field

from starlette.types import Message, Scope, Send

from serve.events import Level
from serve.metrics import UNKNOWN

LEFT = 499  # the caller went away; nginx's number, HTTP has none

_KEY = "graft.record"
_ID_HEADER = b"x-request-id"
_LONGEST_ID = 128


@dataclass
class RequestRecord:
    """Times are `time.monotonic`'s."""

    id: str
    route: str
    began_s: float = field(default_factory=time.monotonic)
    adapter: str = UNKNOWN  # what it is counted under: the public name
    answered_by: str = ""  # NAME@REVISION or the base model
    caller: str = ""
    level: Level | None = None  # where the adapter was; None: the base model
    queued_s: float | None = None
    running_s: float | None = None  # since when it may run
    first_s: float | None = None  # when the first piece of the answer left
    status: int = 0
    streamed: bool = False
    error: str | None = None  # the code, if Graft itself answered
    forwarded: bool = False

    @property
    def waited_s(self) -> float | None:
        return None if self.queued_s is None or self.running_s is None else self.running_s - self.queued_s

    def means(self, adapter: str, answered_by: str, caller: str) -> None:
        self.adapter, self.answered_by, self.caller = adapter, answered_by, caller

    def queues(self, level: Level) -> None:
        self.level, self.queued_s = level, time.monotonic()

    def runs(self) -> None:
        self.running_s = time.monotonic()

    def failed(self, code: str, status: int) -> None:
        self.error, self.status = code, status

    def watching(self, send: Send, header: tuple[bytes, bytes] | None = None) -> Send:
        """`send`, with one more header in front of the answer, seen by this record."""

        def watched(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                message = self._started(message, header)
            elif self.first_s is None and message.get("body"):
                self.first_s = time.monotonic()
            return send(message)

        return watched

    def _started(self, message: Message, header: tuple[bytes, bytes] | None) -> Message:
        headers = [*message.get("headers", ()), *([header] if header else [])]
        self.status = message["status"]
        self.streamed = any(it[0] == b"content-type" and it[1].startswith(b"text/event-stream") for it in headers)
        return {**message, "headers": headers}


def begin(scope: Scope) -> tuple[RequestRecord, Scope]:
    """A record for a request that arrives, and the scope that carries both. Without an `x-request-id` of its own the
    request gets one, which the engine then knows it by."""
    given = next((value for name, value in scope["headers"] if name == _ID_HEADER), None)
    record = RequestRecord(given.decode("latin-1")[:_LONGEST_ID] if given else uuid.uuid4().hex, scope["path"])
    headers = scope["headers"] if given else [*scope["headers"], (_ID_HEADER, record.id.encode())]
    return record, {**scope, "headers": headers, _KEY: record}


def record_of(scope: Scope) -> RequestRecord:
    """The record of a request; a new one that nobody looks at if it has none."""
    record = scope.get(_KEY)
    return record if isinstance(record, RequestRecord) else RequestRecord("", scope["path"])
