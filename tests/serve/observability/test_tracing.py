"""Spans that arrive over real OTLP at a collector of one page."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from starlette.types import Receive, Scope, Send

from serve.gateway.disconnect import DisconnectWatcher
from serve.gateway.response import ResponsePipeline
from serve.gateway.telemetry_middleware import TelemetryMiddleware
from serve.observability.access_log import AccessLog
from serve.observability.recorder import MetricsRecorder
from serve.observability.request_record import record_of
from serve.observability.tracing import Tracer, tracer_of
from serve.settings import TracingSettings

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector:
    """Keeps what is sent to it."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        spans = self.spans

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    import gzip

                    body = gzip.decompress(body)
                request = ExportTraceServiceRequest.FromString(body)
                spans.extend(
                    span for part in request.resource_spans for scope in part.scope_spans for span in scope.spans
                )
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None: ...

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}/v1/traces"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


def attributes(span: Span) -> dict[str, str | int | float | bool]:
    return {
        attribute.key: getattr(attribute.value, attribute.value.WhichOneof("value") or "string_value")
        for attribute in span.attributes
    }


async def asked(collector: Collector, headers: list[tuple[bytes, bytes]], status: int = 200) -> dict[str, str]:
    """One request through a gateway's watch; the headers that the engine saw."""
    seen: dict[str, str] = {}

    async def engine(scope: Scope, receive: Receive, send: Send) -> None:
        record = record_of(scope)
        record.resolved_to("pirate", "pirate@0123456789ab", "someone")
        record.enqueued("cpu")
        record.started()
        seen.update({name.decode(): value.decode() for name, value in scope["headers"]})
        start = {"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/event-stream")]}
        response = ResponsePipeline(send, record, DisconnectWatcher(receive))
        await response.send(start)
        await response.send({"type": "http.response.body", "body": b"data: x\n\n"})

    async def nowhere(_: object) -> None: ...

    tracer = tracer_of(TracingSettings(endpoint=collector.endpoint), "one")
    assert isinstance(tracer, Tracer)
    app = TelemetryMiddleware(engine, MetricsRecorder(10), AccessLog(0), tracer)
    scope = {"type": "http", "path": "/v1/chat/completions", "headers": headers, "client": None}
    await app(scope, nowhere, nowhere)  # type: ignore[arg-type]
    await asyncio.to_thread(tracer.shutdown)
    return seen


async def test_one_trace_leads_from_the_caller_through_the_gateway_to_the_engine(collector: Collector) -> None:
    seen = await asked(collector, [(b"traceparent", f"00-{TRACE}-{CALLER}-01".encode())])

    (span,) = collector.spans
    assert span.trace_id.hex() == TRACE
    assert span.parent_span_id.hex() == CALLER
    assert seen["traceparent"] == f"00-{TRACE}-{span.span_id.hex()}-01", "the engine's span is a child of ours"


async def test_a_span_tells_adapter_revision_and_times(collector: Collector) -> None:
    await asked(collector, [])

    (span,) = collector.spans
    values = attributes(span)
    assert span.name == "chat pirate"
    assert values["gen_ai.operation.name"] == "chat"
    assert values["gen_ai.request.model"] == "pirate"
    assert values["graft.adapter.revision"] == "0123456789ab"
    assert values["graft.adapter.level"] == "cpu"
    assert values["http.response.status_code"] == 200
    assert float(values["gen_ai.server.time_to_first_token"]) >= 0
    assert span.end_time_unix_nano > span.start_time_unix_nano


async def test_a_failure_is_an_error_of_the_span(collector: Collector) -> None:
    await asked(collector, [], status=503)

    (span,) = collector.spans
    assert span.status.code == 2


async def test_a_caller_that_does_not_sample_is_not_traced(collector: Collector) -> None:
    await asked(collector, [(b"traceparent", f"00-{TRACE}-{CALLER}-00".encode())])

    assert collector.spans == []


def test_nothing_is_imported_while_traces_are_off() -> None:
    program = (
        "import sys; from serve.observability.tracing import tracer_of; from serve.settings import TracingSettings; "
        "import serve.gateway.app; assert tracer_of(TracingSettings(), 'one') is None; "
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    result = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)

    assert result.stdout.strip() == "[]"
