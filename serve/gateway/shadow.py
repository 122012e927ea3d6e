"""Copies of requests for a shadow revision: sent only while no request waits for an adapter slot, and dropped as soon
as one does."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import msgspec
from starlette.types import Message, Scope

from serve.adapters.answer_diff import text_of
from serve.adapters.pool import AdapterPool
from serve.adapters.rollout import Rollouts
from serve.engine.protocol import Engine
from serve.gateway.body import with_content_length
from serve.gateway.disconnect import DisconnectWatcher
from serve.gateway.response import CapturedBody, ResponsePipeline, outcome_of
from serve.names import AdapterRevision
from serve.observability.request_record import RequestRecord

_MAX_RUNNING_COPIES = 2
_CHECK_EVERY_S = 0.1
_ABORT_TIMEOUT_S = 2.0
_CALLER = "shadow"

logger = logging.getLogger(__name__)


class Shadows:
    """Has a shadow revision answer a request that a caller got an answer to, and compares the two texts."""

    def __init__(self, engine: Engine, pool: AdapterPool, rollouts: Rollouts) -> None:
        self._engine = engine
        self._pool = pool
        self._rollouts = rollouts
        self._running: set[asyncio.Task[None]] = set()

    def send_copy(self, shadow: AdapterRevision, scope: Scope, fields: dict[str, Any], answer: bytes | None) -> None:
        """Returns at once. `answer` is the body that the caller got; None if there is nothing to compare."""
        answer_text = text_of(answer) if answer else None
        if answer_text is None:
            return
        if len(self._running) >= _MAX_RUNNING_COPIES or not self._pool.can_run_at_once(shadow):
            self._rollouts.record_dropped_copy(shadow)
            return
        task = asyncio.create_task(self._compare(shadow, scope, fields, answer_text))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _compare(self, shadow: AdapterRevision, scope: Scope, fields: dict[str, Any], answer_text: str) -> None:
        body = msgspec.json.encode(fields | {"model": shadow.engine_name})
        client = DisconnectWatcher(_receive_nothing, body)
        request = asyncio.create_task(self._run(shadow, with_content_length(scope, len(body)), client))
        try:
            while not request.done():
                if self._pool.slots.waiting:
                    self._rollouts.record_dropped_copy(shadow)
                    return
                await asyncio.wait({request}, timeout=_CHECK_EVERY_S)
            if shadow_text := request.result():
                self._rollouts.record_comparison(shadow, answer_text, shadow_text)
        except Exception:  # no error of a shadow may disturb anyone
            logger.warning("a copy for the shadow %s failed", shadow, exc_info=True)
        finally:
            client.disconnect()  # aborts the request in the engine, which a cancellation doesn't
            await asyncio.wait({request}, timeout=_ABORT_TIMEOUT_S)
            request.cancel()

    async def _run(self, shadow: AdapterRevision, scope: Scope, client: DisconnectWatcher) -> str | None:
        """The text that the shadow answers; None for an error."""
        record, capture = RequestRecord("", scope["path"]), CapturedBody()
        response = ResponsePipeline(_discard, record, client, capture=capture)
        record.started()
        async with self._pool.use(shadow, _CALLER):
            await self._engine.api(scope, client.receive, response.send)
        self._rollouts.record_outcome(shadow, outcome_of(record))
        body = capture.of_success(record)
        return text_of(body) if body is not None else None


async def _receive_nothing() -> Message:
    await asyncio.Event().wait()
    raise AssertionError


async def _discard(_: Message) -> None:
    """The `send` of a response that nobody gets."""
