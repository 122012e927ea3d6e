"""Hands a request to the engine's own HTTP application: reads its body, resolves its `model`, enforces the policy, and
lets the engine see a disconnect of the client."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
from starlette.types import Receive, Scope, Send

from serve.adapters.canary import RevisionChoice
from serve.adapters.pool import AdapterPool
from serve.adapters.rollout import Rollouts
from serve.callers.identity import caller_of, key_of
from serve.callers.keys import Key
from serve.catalogue.catalogue import Catalogue
from serve.engine.protocol import Engine
from serve.errors import (
    EngineUnavailable,
    HolderLost,
    HolderTimeout,
    PromptLogprobsUnavailable,
    RunTooLong,
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
from serve.gateway.peer_forwarding import (
    EPOCH_HEADER,
    ForwardLimits,
    Peers,
    RevisionUnknown,
    check_addressed_to,
    forwarded_to,
)
from serve.gateway.request_policy import AdmittedRequest, RequestPolicy
from serve.gateway.response import CapturedBody, ResponsePipeline, outcome_of, wait_for_replica_exit
from serve.gateway.shadow import Shadows
from serve.names import AdapterRevision, RequestedModel
from serve.observability.metrics import BASE
from serve.observability.request_record import RequestRecord, record_of

MODEL_HEADER = b"x-graft-model"  # the model that answered: NAME@REVISION, or the base model

_ABORT_TIMEOUT_S = 2.0


@dataclass
class _Request:
    """One request whose body was read. `send` leads to the caller."""

    scope: Scope
    model: str | None  # as the caller wrote it
    fields: Fields
    body: bytes
    client: DisconnectWatcher
    send: Send
    caller: str
    record: RequestRecord

    def run_with(self, adapter: AdapterRevision) -> None:
        """Has the fields and the body name the revision that the request was resolved to."""
        self.record.resolved_to(adapter.name, adapter.engine_name, self.caller)
        self.fields = self.fields | {"model": adapter.engine_name}
        self.body = msgspec.json.encode(self.fields)


class ModelResolver:
    """Resolves the `model` of a request: to the base model, or to a revision of an adapter."""

    def __init__(self, base_model: str, catalogue: Callable[[], Catalogue], rollouts: Rollouts) -> None:
        """`rollouts` choose the revision for callers of an adapter that has a canary."""
        self.base_model = base_model
        self._catalogue = catalogue
        self._rollouts = rollouts

    def epoch(self) -> int:
        """How far this replica has followed the catalogue."""
        return self._catalogue().epoch

    def resolve(self, model: str | None, caller: str, key: Key | None) -> RevisionChoice | None:
        """The revision that answers a request for `model`; None for the base model. Raises UnknownModel, also for a
        model that the caller's key may not use."""
        catalogue = self._catalogue()
        if model is None or model == self.base_model:
            if key is None or key.may_use(self.base_model):
                return None
            raise UnknownModel(model or "", self.known(key))
        requested = RequestedModel.parse(model)
        adapter = catalogue.resolve(requested)
        if adapter is None or (key is not None and not key.may_use(adapter.name)):
            raise UnknownModel(model, self.known(key))
        return RevisionChoice(adapter) if requested.revision else self._rollouts.choose(catalogue, adapter, caller)

    def known(self, key: Key | None) -> set[str]:
        """The model names that a caller with this key may see."""
        names = {self.base_model, *(current.name for current in self._catalogue().current)}
        return names if key is None else {name for name in names if key.may_use(name)}


class EngineCall:
    """The ASGI endpoint of every engine route."""

    def __init__(
        self,
        engine: Engine,
        pool: AdapterPool,
        models: ModelResolver,
        policy: RequestPolicy,
        rollouts: Rollouts,
        peers: Peers | None = None,
    ) -> None:
        self._engine = engine
        self._pool = pool
        self._models = models
        self._policy = policy
        self._rollouts = rollouts
        self._peers = peers
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
        if wants_prompt_logprobs(fields) and not self._engine.supports_prompt_logprobs:
            raise PromptLogprobsUnavailable
        if scope["path"] == "/v1/responses" and not self._engine.runs_tools:
            check_tools(fields)
        client = DisconnectWatcher(receive)
        with self._policy.slow_clients.guard(send) as guarded_send, client.watch(scope):
            model, caller = requested_model(fields), caller_of(scope)
            request = _Request(scope, model, fields, body, client, guarded_send, caller, record_of(scope))
            choice = self._resolve(request)
            if choice is None:
                await self._run_base(request)
            else:
                await self._run_adapter(request, choice)

    def _resolve(self, request: _Request) -> RevisionChoice | None:
        """The revision that answers; None for the base model. Raises UnknownModel, which tells a replica that has
        forwarded the request how far this one has followed the catalogue."""
        try:
            return self._models.resolve(request.model, request.caller, key_of(request.scope))
        except UnknownModel as error:
            if forwarded_to(request.scope) is not None:
                error.headers = {EPOCH_HEADER: str(self._models.epoch())}
            raise

    async def _run_base(self, request: _Request) -> None:
        model = self._models.base_model
        request.record.resolved_to(BASE, model, request.caller)
        async with self._policy.enforce(request.scope, model, request.fields) as admitted:
            request.client.body = with_fields(request.body, request.fields, admitted.added_fields)
            async with self._policy.engine_queue.acquire(request.caller, model) as release:
                await self._run(request, model, admitted, release)

    async def _run_adapter(self, request: _Request, choice: RevisionChoice) -> None:
        request.run_with(choice.adapter)
        try:
            if await self._forward(request, choice.adapter):
                return  # the replica that answered also counts the request
        except RevisionUnknown as answer:
            choice = await self._resolve_again(request, answer.epoch)
            request.run_with(choice.adapter)
        await self._run_adapter_here(request, choice)

    async def _resolve_again(self, request: _Request, epoch: int) -> RevisionChoice:
        """The choice by the newest catalogue: at least as new as that of a holder that doesn't know the revision which
        was chosen before. Raises UnknownModel if the model is gone, and CatalogueBehind."""
        assert self._peers
        await self._peers.catch_up(epoch, self._models.epoch, self._policy.max_wait_s)
        choice = self._resolve(request)
        assert choice is not None, "a name of an adapter never becomes that of the base model"
        return choice

    async def _run_adapter_here(self, request: _Request, choice: RevisionChoice) -> None:
        adapter, fields, body = choice.adapter, request.fields, request.body
        capture = CapturedBody() if choice.shadow else None
        async with self._policy.enforce(request.scope, adapter.name, fields) as admitted:
            request.client.body = with_fields(body, fields, admitted.added_fields)
            await self._run_in_slots(request, choice, admitted, capture)
        if choice.shadow and capture:
            copied = fields | dict(admitted.added_fields)  # what the caller's answer was limited to
            self._shadows.send_copy(choice.shadow, request.scope, copied, capture.of_success(request.record))

    async def _run_in_slots(
        self, request: _Request, choice: RevisionChoice, admitted: AdmittedRequest, capture: CapturedBody | None
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

    async def _forward(self, request: _Request, adapter: AdapterRevision) -> bool:
        """Forwards the request to a replica that holds the adapter, if this replica would have to wait for a slot or
        evict an adapter. Returns whether the other replica has answered. Raises RevisionUnknown, HolderTimeout or
        HolderLost."""
        record = request.record
        if self._peers is None or self._pool.can_run_at_once(adapter) or forwarded_to(request.scope) is not None:
            return False
        holder = await self._peers.holder_of(adapter)
        if holder is None:
            return False
        scope = with_content_length(request.scope, len(request.body))
        response = ResponsePipeline(request.send, record, request.client)
        limits = ForwardLimits.of(self._policy.max_wait_s, self._policy.max_run_s)
        try:
            record.forwarded = await self._peers.forward(holder, scope, request.body, response.send, limits)
        except (HolderTimeout, HolderLost) as error:
            record.forwarded = True
            if not record.streamed:
                raise  # an answer that has begun is broken off
            await response.end_with(error)
        return record.forwarded

    async def _run(
        self,
        request: _Request,
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
