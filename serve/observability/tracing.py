"""Traces over OTLP: a span for each request from its arrival to its end, with the engine's spans below it.

OpenTelemetry is imported only if an endpoint is set. The engine continues the trace of the header `traceparent`, in
which the gateway forwards the id of its own span.
"""

from __future__ import annotations

from typing import Any

from starlette.types import Scope

from serve.observability.request_record import RequestRecord
from serve.settings import TracingSettings

_OPERATIONS = {"/v1/chat/completions": "chat", "/v1/messages": "chat", "/v1/responses": "chat",
               "/v1/completions": "text_completion", "/v1/embeddings": "embeddings"}  # fmt: skip


class Tracer:
    """Spans of one replica, named and described by OpenTelemetry's conventions for generative AI."""

    def __init__(self, settings: TracingSettings, replica: str) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        resource = Resource.create({"service.name": "graft", "service.instance.id": replica})
        self._provider = TracerProvider(
            resource=resource, sampler=ParentBased(TraceIdRatioBased(settings.sample)), shutdown_on_exit=False
        )
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(settings.endpoint)))
        self._tracer = self._provider.get_tracer("graft.gateway")
        self._propagator = TraceContextTextMapPropagator()
        self._spans: dict[int, Any] = {}  # by the id of the record

    def begin(self, record: RequestRecord, scope: Scope) -> Scope:
        """The scope with the trace context of a new span."""
        from opentelemetry import trace

        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        span = self._tracer.start_span(
            record.route, context=self._propagator.extract(headers), kind=trace.SpanKind.SERVER
        )
        self._spans[id(record)] = span
        context: dict[str, str] = {}
        self._propagator.inject(context, context=trace.set_span_in_context(span))
        received = [header for header in scope["headers"] if header[0].decode("latin-1") not in context]
        added = [(name.encode(), value.encode()) for name, value in context.items()]
        return {**scope, "headers": [*received, *added]}

    def end(self, record: RequestRecord) -> None:
        from opentelemetry.trace import Status, StatusCode

        span = self._spans.pop(id(record))
        operation = _OPERATIONS.get(record.route, record.route.rpartition("/")[2])
        span.update_name(f"{operation} {record.adapter}")
        span.set_attributes(
            {name: value for name, value in _attributes(record, operation).items() if value is not None}
        )
        if record.status >= 500:
            span.set_status(Status(StatusCode.ERROR, record.error))
        span.end()

    def shutdown(self) -> None:
        """Send the spans that are not sent yet."""
        self._provider.shutdown()


def _attributes(record: RequestRecord, operation: str) -> dict[str, Any]:
    first_s = record.first_s - record.began_s if record.first_s else None
    return {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "graft",
        "gen_ai.request.model": record.adapter,
        "gen_ai.response.model": record.answered_by or None,
        "gen_ai.server.time_to_first_token": first_s if record.streamed else None,
        "graft.adapter.revision": record.answered_by.partition("@")[2] or None,
        "graft.adapter.level": record.level,
        "graft.queue.wait": record.waited_s,
        "graft.request.id": record.id,
        "graft.caller": record.caller or None,
        "graft.forwarded": record.forwarded or None,
        "http.request.method": "POST",
        "http.route": record.route,
        "http.response.status_code": record.status,
        "error.type": record.error,
    }


def tracer_of(settings: TracingSettings, replica: str) -> Tracer | None:
    """None if traces are off; then OpenTelemetry is not imported."""
    return Tracer(settings, replica) if settings.endpoint else None
