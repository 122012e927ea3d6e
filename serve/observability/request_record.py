"""The record of one request while it is served, which metrics, the access log and the trace read."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field

from starlette.types import Scope

from serve.observability.events import Level
from serve.observability.metrics import UNKNOWN

CLIENT_CLOSED_REQUEST = 499  # the client disconnected: nginx's status, HTTP has none
# Who leaves without a byte after this long didn't change his mind: the shortest timeout in front of a server, a load
# balancer's, is 30 s. Without this an engine that hangs would fail nobody, because every caller leaves it.
ABANDONED_AFTER_S = 30.0

_KEY = "graft.record"
_ID_HEADER = b"x-request-id"
_LONGEST_ID = 128


@dataclass
class RequestRecord:
    """Times are `time.monotonic`'s."""

    id: str
    route: str
    began_s: float = field(default_factory=time.monotonic)
    adapter: str = UNKNOWN  # the public name, which metrics count it under
    answered_by: str = ""  # NAME@REVISION or the base model
    caller: str = ""
    level: Level | None = None  # where the adapter was; None: the base model
    queued_s: float | None = None
    running_s: float | None = None  # when it was started
    first_s: float | None = None  # when the first chunk of the response was sent
    status: int = 0
    streamed: bool = False
    error: str | None = None  # the code, if Graft itself answered
    forwarded: bool = False

    @property
    def waited_s(self) -> float | None:
        return None if self.queued_s is None or self.running_s is None else self.running_s - self.queued_s

    @property
    def age_s(self) -> float:
        return time.monotonic() - self.began_s

    @property
    def has_failed(self) -> bool:
        """Whether the request counts against the objective of availability, asked at its end."""
        is_abandoned = self.status == CLIENT_CLOSED_REQUEST and self.first_s is None and self.age_s >= ABANDONED_AFTER_S
        return self.status >= 500 or is_abandoned

    def resolved_to(self, adapter: str, answered_by: str, caller: str) -> None:
        self.adapter, self.answered_by, self.caller = adapter, answered_by, caller

    def enqueued(self, level: Level) -> None:
        self.level, self.queued_s = level, time.monotonic()

    def started(self) -> None:
        self.running_s = time.monotonic()

    def failed(self, code: str, status: int) -> None:
        self.error, self.status = code, status

    def response_started(self, status: int, headers: Iterable[tuple[bytes, bytes]]) -> None:
        self.status = status
        self.streamed = is_stream(headers)

    def first_byte_sent(self) -> None:
        """Only the first call counts."""
        if self.first_s is None:
            self.first_s = time.monotonic()


def is_stream(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Whether these headers of a response announce a stream of events."""
    return any(name == b"content-type" and value.startswith(b"text/event-stream") for name, value in headers)


def begin(scope: Scope) -> tuple[RequestRecord, Scope]:
    """A record for a request that arrives, and the ASGI scope that carries it. A request without an `x-request-id` gets
    one, under which the engine then knows it."""
    given_id = next((value for name, value in scope["headers"] if name == _ID_HEADER), None)
    record = RequestRecord(given_id.decode("latin-1")[:_LONGEST_ID] if given_id else uuid.uuid4().hex, scope["path"])
    headers = scope["headers"] if given_id else [*scope["headers"], (_ID_HEADER, record.id.encode())]
    return record, {**scope, "headers": headers, _KEY: record}


def record_of(scope: Scope) -> RequestRecord:
    """The record of a request; if it has none, a new one that nothing reads."""
    record = scope.get(_KEY)
    return record if isinstance(record, RequestRecord) else RequestRecord("", scope["path"])
