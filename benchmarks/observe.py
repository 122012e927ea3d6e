"""Overhead of telemetry: CPU microseconds for each request and token, CPU milliseconds for each scrape.

    python -m benchmarks.observe

It counts the CPU time of this process, which other processes affect little. No engine runs; the overhead comes on top
of an engine's work.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from prometheus_client import generate_latest
from starlette.types import Message, Receive, Scope, Send

from serve.deployment.metrics_collector import MetricsCollector
from serve.gateway.disconnect import DisconnectWatcher
from serve.gateway.response import ResponsePipeline
from serve.gateway.telemetry_middleware import TelemetryMiddleware
from serve.observability.access_log import AccessLog
from serve.observability.recorder import Finished, MetricsRecorder
from serve.observability.request_record import record_of
from serve.settings import EngineSettings, GatewaySettings, ServeSettings

REQUESTS, TOKENS, ADAPTERS, ROUNDS = 3000, 32, 10_000, 5
_HEADER = (b"x-graft-model", b"pirate@0123456789ab")


def main() -> None:
    recorder = MetricsRecorder(max_adapters=100)
    request_us = min(_per_request_us(recorder, TOKENS) - _bare_us(TOKENS) for _ in range(ROUNDS))
    longer_us = min(_per_request_us(recorder, 10 * TOKENS) - _bare_us(10 * TOKENS) for _ in range(ROUNDS))
    print(f"a request of {TOKENS} tokens: {request_us:.1f} µs of CPU")
    print(f"a token: {max(0.0, (longer_us - request_us) / (9 * TOKENS)):.3f} µs of CPU")
    for number in range(ADAPTERS):
        recorder.engine_finished(Finished(f"adapter-{number}@0123456789ab", 5, 0, 3, 0.01))
    print(f"a scrape, after {ADAPTERS} adapters: {_scrape_ms(recorder):.1f} ms of CPU")


def _per_request_us(recorder: MetricsRecorder, tokens: int) -> float:
    async def engine(scope: Scope, receive: Receive, send: Send) -> None:
        record = record_of(scope)
        record.resolved_to("pirate", "pirate@0123456789ab", "someone")
        record.enqueued("gpu")
        record.started()
        response = ResponsePipeline(send, record, DisconnectWatcher(receive), headers=(_HEADER,))
        await _stream(response.send, tokens)
        recorder.engine_finished(Finished("pirate@0123456789ab", 5, 0, 3, 0.01))

    return _timed_us(TelemetryMiddleware(engine, recorder, AccessLog(0)))


def _bare_us(tokens: int) -> float:
    """The same stream without telemetry; only the model header is added."""

    async def engine(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_header(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], _HEADER]}
            await send(message)

        await _stream(send_with_header, tokens)

    return _timed_us(engine)


def _timed_us(app: object) -> float:
    async def run() -> float:
        scope = {"type": "http", "path": "/v1/chat/completions", "headers": [(b"host", b"graft")], "client": None}
        began = time.process_time()
        for _ in range(REQUESTS):
            await app(scope, _nothing, _nowhere)  # type: ignore[operator]
        return (time.process_time() - began) / REQUESTS * 1e6

    return asyncio.run(run())


async def _stream(send: Send, tokens: int) -> None:
    headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for _ in range(tokens):
        await send({"type": "http.response.body", "body": b"data: x\n\n", "more_body": True})


async def _nothing() -> Message:
    return {"type": "http.disconnect"}


async def _nowhere(_: Message) -> None: ...


def _scrape_ms(recorder: MetricsRecorder) -> float:
    settings = ServeSettings(
        engine=EngineSettings(model_path=Path(), model_name="m", fingerprint="0" * 64),
        gateway=GatewaySettings(admin_tokens={}),
        state_dir=Path(),
    )
    snapshot = MetricsCollector(settings, recorder)
    spent = []
    for _ in range(ROUNDS):
        began = time.process_time()
        generate_latest(snapshot)
        spent.append(time.process_time() - began)
    return min(spent) * 1e3


if __name__ == "__main__":
    main()
