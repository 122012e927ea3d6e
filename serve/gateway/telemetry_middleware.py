"""The outermost part of the gateway: a record for every request, counted and written down when it has ended."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Receive, Scope, Send

from serve.access import AccessLog
from serve.openai import ENGINE_ROUTES
from serve.recorder import Recorder
from serve.request_record import LEFT, begin
from serve.tracing import Tracer

_ENGINE_ROUTES = frozenset(ENGINE_ROUTES)


class Observed:
    """An ASGI application that is watched. Adds nothing to the path of a token: whoever answers lets the record see
    what it sends (`RequestRecord.watching`)."""

    def __init__(self, app: ASGIApp, recorder: Recorder, log: AccessLog, tracer: Tracer | None = None) -> None:
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
            record.status = LEFT
            raise
        finally:
            self._recorder.in_flight -= is_engine_call
            self._recorder.request_ended(record, is_engine_call)
            if is_engine_call:
                self._log.request_ended(record)
                if self._tracer:
                    self._tracer.end(record)
