"""Copies of requests for a shadow revision: made only where nobody waits, and dropped as soon as someone does."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import msgspec
from starlette.types import Message, Scope

from serve.answers import text_of
from serve.client import Client, with_content_length
from serve.engine import Engine
from serve.names import AdapterRevision
from serve.residency import AdapterPool
from serve.rollout import Rollouts
from serve.witness import Witness

_AT_ONCE = 2
_LOOK_EVERY_S = 0.1
_ABORT_TIMEOUT_S = 2.0
_CALLER = "shadow"

logger = logging.getLogger(__name__)


class Shadows:
    """Has a shadow revision answer what a user was answered already, and compares the two."""

    def __init__(self, engine: Engine, pool: AdapterPool, rollouts: Rollouts) -> None:
        self._engine = engine
        self._pool = pool
        self._rollouts = rollouts
        self._running: set[asyncio.Task[None]] = set()

    def send_copy(self, shadow: AdapterRevision, scope: Scope, fields: dict[str, Any], told: bytes | None) -> None:
        """Returns at once. `told` is the body that the user got; None if there is nothing to compare."""
        text = text_of(told) if told else None
        if text is None:
            return
        if len(self._running) >= _AT_ONCE or not self._pool.is_at_hand(shadow):
            self._rollouts.dropped(shadow)
            return
        task = asyncio.create_task(self._compare(shadow, scope, fields, text))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _compare(self, shadow: AdapterRevision, scope: Scope, fields: dict[str, Any], told: str) -> None:
        body = msgspec.json.encode(fields | {"model": shadow.engine_name})
        client = Client(_never, body)
        asking = asyncio.create_task(self._ask(shadow, with_content_length(scope, len(body)), client))
        try:
            while not asking.done():
                if self._pool.turns.waiting:
                    self._rollouts.dropped(shadow)
                    return
                await asyncio.wait({asking}, timeout=_LOOK_EVERY_S)
            if said := asking.result():
                self._rollouts.compared(shadow, told, said)
        except Exception:  # a shadow disturbs nobody
            logger.warning("a copy for the shadow %s failed", shadow, exc_info=True)
        finally:
            client.left()  # the engine stops for that, and not for a cancellation
            await asyncio.wait({asking}, timeout=_ABORT_TIMEOUT_S)
            asking.cancel()

    async def _ask(self, shadow: AdapterRevision, scope: Scope, client: Client) -> str | None:
        witness = Witness(_nobody, keeps_body=True)
        async with self._pool.use(shadow, _CALLER):
            await self._engine.api(scope, client.receive, witness.send)
        self._rollouts.seen(shadow, witness.outcome())
        return text_of(witness.body) if witness.body is not None else None


async def _never() -> Message:
    await asyncio.Event().wait()
    raise AssertionError


async def _nobody(_: Message) -> None:
    """Where a shadow's answer goes."""
