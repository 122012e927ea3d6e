"""Has another replica answer a request: one of the pool that serves its model, or one that holds its adapter."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import msgspec
from starlette.types import Scope, Send

from serve.callers.identity import key_of
from serve.errors import HolderLost, HolderTimeout, PoolUnavailable
from serve.gateway.body import Fields, with_content_length
from serve.gateway.disconnect import DisconnectWatcher
from serve.gateway.request_policy import RequestPolicy
from serve.gateway.response import ResponsePipeline
from serve.gateway.routing.forwarding import ForwardLimits, RevisionUnknown, forwarded_to, senders_epoch
from serve.gateway.routing.other_pool import OtherPool
from serve.gateway.routing.peers import Peers
from serve.gateway.routing.resolver import ModelResolver
from serve.names import AdapterRevision
from serve.observability.request_record import RequestRecord

_Forward = Callable[[Scope, Send, ForwardLimits], Awaitable[bool]]


@dataclass
class ParsedRequest:
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
        self.run_as(adapter.name, adapter.engine_name)

    def run_as(self, name: str, engine_name: str) -> None:
        """Has the fields and the body name what the engine knows; the request is counted under `name`."""
        self.record.resolved_to(name, engine_name, self.caller)
        self.fields = self.fields | {"model": engine_name}
        self.body = msgspec.json.encode(self.fields)


class Relay:
    """The requests of one replica that others answer. Without `peers` this replica answers everything itself."""

    def __init__(self, peers: Peers | None, models: ModelResolver, policy: RequestPolicy) -> None:
        self._peers = peers
        self._models = models
        self._policy = policy

    async def to_pool(self, request: ParsedRequest) -> bool:
        """Forwards a request of a client to the pool that serves its model. Returns whether it was answered there; if
        not, it is this replica's. Raises UnknownModel, ModelMissing, PoolUnavailable, CatalogueBehind, HolderTimeout or
        HolderLost."""
        if (pool := self._other_pool(request)) is None:
            return False
        try:
            return await self._forward_to(pool, request)
        except RevisionUnknown as answer:
            await self.catch_up(answer.epoch)
        except PoolUnavailable:
            if self._peers is None or pool.settings.sleep_after_s is None:
                raise
            await self._peers.follow()  # it may have fallen asleep a moment ago
        if (pool := self._other_pool(request)) is None:
            return False
        try:
            return await self._forward_to(pool, request)
        except RevisionUnknown:
            raise PoolUnavailable(pool.name) from None

    async def to_holder(self, request: ParsedRequest, adapter: AdapterRevision) -> bool:
        """Forwards a request of a client to a replica of this pool that holds the adapter, and isn't busier. Returns
        whether it has answered. Raises RevisionUnknown, HolderTimeout or HolderLost."""
        if self._peers is None or forwarded_to(request.scope) is not None:
            return False
        holder, forwarder, body = await self._peers.holder_of(adapter), self._peers.forwarder, request.body
        if holder is None:
            return False
        return await self._answer(
            request, lambda scope, send, limits: forwarder.forward(holder, scope, body, send, limits)
        )

    async def catch_up(self, epoch: int) -> None:
        """Returns when this replica has followed the catalogue up to `epoch`. Raises CatalogueBehind."""
        assert self._peers
        await self._peers.catch_up(epoch, self._models.epoch, self._policy.max_wait_s)

    async def catch_up_with_sender(self, request: ParsedRequest) -> bool:
        """Follows the catalogue as far as the replica that has forwarded the request. Returns False if this replica has
        followed it as far already. Raises CatalogueBehind."""
        epoch = senders_epoch(request.scope)
        if self._peers is None or forwarded_to(request.scope) is None or epoch <= self._models.epoch():
            return False
        await self.catch_up(epoch)
        return True

    def _other_pool(self, request: ParsedRequest) -> OtherPool | None:
        """None for a request that was forwarded, or that this replica's own pool answers."""
        if forwarded_to(request.scope) is not None:
            return None
        return self._models.other_pool(request.model, key_of(request.scope))

    async def _forward_to(self, pool: OtherPool, request: ParsedRequest) -> bool:
        model, body, epoch = request.model or "", request.body, self._models.epoch()
        return await self._answer(
            request, lambda scope, send, limits: pool.forward(model, scope, body, send, limits, epoch)
        )

    async def _answer(self, request: ParsedRequest, forward: _Forward) -> bool:
        """Has `forward` answer the request. Returns whether it did. A stream that is broken off ends with an error as
        its last event; before it begins, HolderTimeout or HolderLost is raised."""
        record = request.record
        scope = with_content_length(request.scope, len(request.body))
        response = ResponsePipeline(request.send, record, request.client)
        limits = ForwardLimits.of(self._policy.max_wait_s, self._policy.max_run_s)
        try:
            record.forwarded = await forward(scope, response.send, limits)
        except (HolderTimeout, HolderLost) as error:
            record.forwarded = True
            if not record.streamed:
                raise  # an answer that has begun is broken off
            await response.end_with(error)
        return record.forwarded
