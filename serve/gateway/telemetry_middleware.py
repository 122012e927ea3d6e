"""The outermost middleware: keeps a record of every request, and counts, logs and traces the request at its end."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Receive, Scope, Send

from serve.gateway.public_routes import ENGINE_ROUTES
from serve.observability.access_log import AccessLog
from serve.observability.recorder import MetricsRecorder
from serve.observability.request_record import CLIENT_CLOSED_REQUEST, begin
from serve.observability.tracing import Tracer

_ENGINE_ROUTES = frozenset(ENGINE_ROUTES)


class TelemetryMiddleware:
    """ASGI middleware. It doesn't wrap `send`, which is called for each token: the code that answers records the
    status and the first byte in the request's record."""

    def __init__(self, app: ASGIApp, recorder: MetricsRecorder, log: AccessLog, tracer: Tracer | None = None) -> None:
        self._app = app
        self._recorder = recorder
        self._log = log
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        record, scope = begin(scope)
        is_engine_call = record.route in _ENGINE_ROUTES
        if is_engine_call and self._tracer:
            scope = self._tracer.begin(record, scope)
        self._recorder.in_flight += is_engine_call
        try:
            await self._app(scope, receive, send)
        except asyncio.CancelledError:
            record.status = CLIENT_CLOSED_REQUEST
            raise
        finally:
            self._recorder.in_flight -= is_engine_call
            self._recorder.request_ended(record, is_engine_call)
            if is_engine_call:
                self._log.request_ended(record)
                if self._tracer:
                    self._tracer.end(record)
