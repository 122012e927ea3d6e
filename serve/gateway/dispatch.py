"""Hands a request to the engine's own HTTP application: reads its body, resolves its `model`, enforces the policy, and
lets the engine see a disconnect of the client."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Container

from starlette.types import Receive, Scope, Send

from serve.adapters.canary import RevisionChoice
from serve.adapters.pool import AdapterPool
from serve.adapters.rollout import Rollouts
from serve.callers.identity import caller_of, key_of
from serve.engine.protocol import Engine
from serve.errors import (
    EngineUnavailable,
    PromptLogprobsUnavailable,
    RunTooLong,
    TaskUnsupported,
    UnknownModel,
)
from serve.gateway.body import (
    Fields,
    check_tools,
    parse_fields,
    read_body,
    requested_model,
    wants_prompt_logprobs,
    with_content_length,
    with_fields,
)
from serve.gateway.disconnect import DisconnectWatcher
from serve.gateway.request_policy import AdmittedRequest, RequestPolicy
from serve.gateway.response import CapturedBody, ResponsePipeline, outcome_of, wait_for_replica_exit
from serve.gateway.routing.forwarding import EPOCH_HEADER, RevisionUnknown, check_addressed_to, forwarded_to
from serve.gateway.routing.peers import Peers
from serve.gateway.routing.relay import ParsedRequest, Relay
from serve.gateway.routing.resolver import ModelResolver
from serve.gateway.shadow import Shadows
from serve.observability.metrics import BASE
from serve.observability.request_record import record_of

MODEL_HEADER = b"x-graft-model"  # the model that answered: NAME@REVISION, or the base model

_ABORT_TIMEOUT_S = 2.0


class EngineCall:
    """The ASGI endpoint of every engine route."""

    def __init__(
        self,
        engine: Engine,
        pool: AdapterPool,
        models: ModelResolver,
        policy: RequestPolicy,
        rollouts: Rollouts,
        peers: Peers | None,
        offered: Container[str],
    ) -> None:
        """`peers`: the other replicas, if there are any; `offered`: the routes that the engine answers."""
        self._engine = engine
        self._pool = pool
        self._models = models
        self._policy = policy
        self._rollouts = rollouts
        self._peers = peers
        self._relay = Relay(peers, models, policy)
        self._offered = offered
        self._shadows = Shadows(engine, pool, rollouts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._engine.is_dead:
            await wait_for_replica_exit()
            raise EngineUnavailable
        check_addressed_to(scope, self._peers.replica if self._peers else None)
        with self._policy.limited(scope, receive) as limited:
            await self._answer(scope, receive, send, await read_body(limited))

    async def _answer(self, scope: Scope, receive: Receive, send: Send, body: bytes) -> None:
        fields = parse_fields(body)
        client = DisconnectWatcher(receive)
        with self._policy.slow_clients.guard(send) as guarded_send, client.watch(scope):
            model, caller = requested_model(fields), caller_of(scope)
            request = ParsedRequest(scope, model, fields, body, client, guarded_send, caller, record_of(scope))
            if not await self._relay.to_pool(request):
                await self._answer_here(request)

    async def _answer_here(self, request: ParsedRequest) -> None:
        self._check_supported(request.scope["path"], request.fields)
        choice = await self._resolve(request)
        if choice is None:
            await self._run_base(request)
        else:
            await self._run_adapter(request, choice)

    def _check_supported(self, path: str, fields: Fields) -> None:
        """Raises TaskUnsupported, PromptLogprobsUnavailable or ToolUnsupported."""
        if path not in self._offered:
            raise TaskUnsupported(path)
        if wants_prompt_logprobs(fields) and not self._engine.supports_prompt_logprobs:
            raise PromptLogprobsUnavailable
        if path == "/v1/responses" and not self._engine.runs_tools:
            check_tools(fields)

    async def _resolve(self, request: ParsedRequest) -> RevisionChoice | None:
        """The revision that answers; None for the base model. If another replica has forwarded the request and knows a
        newer catalogue, this one catches up first. Raises UnknownModel, which tells the other replica how far this one
        has followed the catalogue, or CatalogueBehind."""
        try:
            return self._models.resolve(request.model, request.caller, key_of(request.scope))
        except UnknownModel as error:
            if await self._relay.catch_up_with_sender(request):
                return await self._resolve(request)
            if forwarded_to(request.scope) is not None:
                error.headers = {EPOCH_HEADER: str(self._models.epoch())}
            raise

    async def _run_base(self, request: ParsedRequest) -> None:
        model = self._models.base_model
        name = self._models.public_name(request.model)
        if name == model:
            request.record.resolved_to(BASE, model, request.caller)
        else:
            request.run_as(name, model)
        async with self._policy.enforce(request.scope, name, request.fields) as admitted:
            request.client.body = with_fields(request.body, request.fields, admitted.added_fields)
            async with self._policy.engine_queue.acquire(request.caller, name) as release:
                await self._run(request, model, admitted, release)

    async def _run_adapter(self, request: ParsedRequest, choice: RevisionChoice) -> None:
        request.run_with(choice.adapter)
        try:
            if not self._pool.can_run_at_once(choice.adapter) and await self._relay.to_holder(request, choice.adapter):
                return  # the replica that answered also counts the request
        except RevisionUnknown as answer:
            choice = await self._resolve_again(request, answer.epoch)
            request.run_with(choice.adapter)
        await self._run_adapter_here(request, choice)

    async def _resolve_again(self, request: ParsedRequest, epoch: int) -> RevisionChoice:
        """The choice by the newest catalogue: at least as new as that of a holder that doesn't know the revision which
        was chosen before. Raises UnknownModel if the model is gone, and CatalogueBehind."""
        await self._relay.catch_up(epoch)
        choice = await self._resolve(request)
        assert choice is not None, "an adapter's name never stands for the base model that it is made for"
        return choice

    async def _run_adapter_here(self, request: ParsedRequest, choice: RevisionChoice) -> None:
        adapter, fields, body = choice.adapter, request.fields, request.body
        capture = CapturedBody() if choice.shadow else None
        async with self._policy.enforce(request.scope, adapter.name, fields) as admitted:
            request.client.body = with_fields(body, fields, admitted.added_fields)
            await self._run_in_slots(request, choice, admitted, capture)
        if choice.shadow and capture:
            copied = fields | dict(admitted.added_fields)  # what the caller's answer was limited to
            self._shadows.send_copy(choice.shadow, request.scope, copied, capture.of_success(request.record))

    async def _run_in_slots(
        self, request: ParsedRequest, choice: RevisionChoice, admitted: AdmittedRequest, capture: CapturedBody | None
    ) -> None:
        """Waits for a slot of the adapter and one of the engine, runs the request, and records in the adapter's rollout
        how the request ended."""
        adapter, caller, record = choice.adapter, request.caller, request.record
        record.enqueued(self._pool.level_of(adapter))
        async with self._pool.use(adapter, caller), self._policy.engine_queue.acquire(caller, adapter.name) as release:
            record.started()
            try:
                await self._run(request, adapter.engine_name, admitted, release, capture)
            except asyncio.CancelledError:
                raise  # a client that disconnects says nothing about the revision
            except Exception:
                self._rollouts.record_outcome(adapter, outcome_of(record, failed=True))
                raise
            self._rollouts.record_outcome(adapter, outcome_of(record))

    async def _run(
        self,
        request: ParsedRequest,
        model: str,
        admitted: AdmittedRequest,
        release: Callable[[], None],
        capture: CapturedBody | None = None,
    ) -> None:
        """Runs the request in the engine. Raises CancelledError if the client disconnects, whether this task is
        cancelled or the engine receives the disconnect first."""
        client = request.client
        assert client.body is not None
        scope = with_content_length(request.scope, len(client.body))

        async def settle() -> None:
            release()
            await (admitted.refuse() if response.is_replaced else admitted.settle())

        response = ResponsePipeline(
            request.send,
            request.record,
            client,
            headers=((MODEL_HEADER, model.encode()), *admitted.limit_headers),
            engine=self._engine,
            tokens=admitted.used,
            fields=request.fields,
            before_last=settle,
            capture=capture,
        )
        running = asyncio.ensure_future(self._engine.api(scope, client.receive, response.send))
        try:
            await asyncio.wait({running}, timeout=self._policy.max_run_s)
        except asyncio.CancelledError:
            await _abort(running, client)
            raise
        if not running.done():
            response.end()
            await _abort(running, client)
            await response.end_with(RunTooLong(self._policy.max_run_s))
            return
        try:
            running.result()
        except Exception:
            if not await response.send_fault():
                raise
        if response.is_replaced:
            request.record.failed(EngineUnavailable.code, EngineUnavailable.status)
        elif client.is_disconnected:
            raise asyncio.CancelledError


async def _abort(running: asyncio.Future[None], client: DisconnectWatcher) -> None:
    """Ends a request in the engine. vLLM aborts a request whose client disconnects. If only its task is cancelled, it
    runs to its end."""
    client.disconnect()
    await asyncio.wait({running}, timeout=_ABORT_TIMEOUT_S)
    running.cancel()
