"""An engine without a model, for the logic around engines."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from starlette.types import Receive, Scope, Send

from serve.engine.prompt_size import PromptSize
from serve.engine.token_counter import current_counter
from serve.errors import AdapterUnavailable
from serve.gateway.public_routes import ENGINE_ROUTES
from serve.names import AdapterRevision

Handler = Callable[[Scope, Receive, Send], Awaitable[None]]


class FakeEngine:
    """Keeps the promises of serve.engine.protocol.Engine; its API answers with the body it was given."""

    def __init__(self, refuses: frozenset[AdapterRevision] = frozenset()) -> None:
        self.is_dead = False
        self.running_requests = 0
        self.max_running_requests = 256
        self.refuses = set(refuses)
        self.resident: set[AdapterRevision] = set()
        self.loads: list[AdapterRevision] = []
        self.unloads: list[AdapterRevision] = []
        self.paths: dict[AdapterRevision, Path] = {}
        self.load_delay_s = 0.0
        self.handler: Handler = echo
        self.unknown_count = 0
        self.says: dict[AdapterRevision | None, float] = {}  # the log-probability of every token; absent: its own
        self.adapters_say = -2.0  # unless `says` has it
        self.probed: list[AdapterRevision | None] = []
        self.supports_prompt_logprobs = True
        self.runs_tools = False
        self.vocabulary_size = 272
        self.context_tokens = 64
        self.prompt_size = PromptSize(tokens_per_byte=0.25, template_tokens=8)
        self.routes = ENGINE_ROUTES

    @property
    def openapi(self) -> Mapping[str, Any]:
        """Its routes, and one that must not be public."""
        operation = {"post": {"responses": {"200": {"description": "an answer"}}}}
        return {"openapi": "3.1.0", "paths": dict.fromkeys((*self.routes, "/scale_elastic_ep"), operation)}

    async def api(self, scope: Scope, receive: Receive, send: Send) -> None:
        if tokens := current_counter():
            tokens.has_output = True  # so a stream begins at once
        await self.handler(scope, receive, send)

    async def load_adapter(self, adapter: AdapterRevision, path: Path) -> None:
        await asyncio.sleep(self.load_delay_s)
        if adapter in self.refuses:
            raise AdapterUnavailable(f"The engine can't load {adapter}: rank too large")
        assert adapter not in self.resident, "loaded twice"
        self.loads.append(adapter)
        self.paths[adapter] = path
        self.resident.add(adapter)

    async def unload_adapter(self, adapter: AdapterRevision) -> None:
        self.unloads.append(adapter)
        self.resident.remove(adapter)

    async def resident_adapters(self) -> frozenset[AdapterRevision]:
        return frozenset(self.resident)

    async def unload_unknown(self) -> int:
        unloaded, self.unknown_count = self.unknown_count, 0
        return unloaded

    async def logprobs(
        self, adapter: AdapterRevision | None, token_ids: Sequence[int], positions: Sequence[int]
    ) -> tuple[float, ...]:
        assert adapter is None or adapter in self.resident, "asked before it was loaded"
        self.probed.append(adapter)
        own = -1.0 if adapter is None else self.adapters_say
        return (self.says.get(adapter, own),) * len(positions)

    async def check_health(self) -> None:
        if self.is_dead:
            raise RuntimeError("dead")


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers 200 with the request's path, its headers and its body."""
    message = await receive()
    headers = {name.decode(): value.decode() for name, value in scope["headers"]}
    answer = {"path": scope["path"], "headers": headers, "body": message["body"].decode()}
    await respond(send, 200, json.dumps(answer).encode())


async def respond(send: Send, status: int, body: bytes) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": body})
