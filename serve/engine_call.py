"""One request handed to the engine's own HTTP application: its body read whole, its `model` resolved, its
client's disconnect told to the engine, and nothing said for a dead engine, so that the proxy asks another one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from starlette.types import Message, Receive, Scope, Send

from serve.caller import caller_of, key_of
from serve.catalogue import Catalogue
from serve.client import Client, with_content_length
from serve.config import GatewaySettings
from serve.engine import Engine
from serve.errors import (
    BodyTooLarge,
    BodyTooSlow,
    EngineUnavailable,
    InvalidBody,
    PromptLogprobsUnavailable,
    UnknownModel,
)
from serve.forward import Peers, check_meant, forwarded_to
from serve.keys import Key
from serve.metrics import BASE
from serve.names import AdapterRevision, RequestedModel
from serve.openai import error_response, wants_prompt_logprobs
from serve.passage import Passage, Passages
from serve.request_record import RequestRecord, record_of
from serve.residency import AdapterPool
from serve.rollout import Choice, Rollouts
from serve.shadow import Shadows
from serve.witness import Witness

MODEL_HEADER = b"x-graft-model"  # what answered: NAME@REVISION, or the base model

_ABORT_TIMEOUT_S = 2.0
# A replica ends with its engine, within less. The proxy has another one answer what got no word until then; a quick
# refusal would make a dead replica look like the least loaded of all.
_SILENCE_S = 2.0
_DIGITS_OF_64_BITS = 20

# Only the top level is parsed: every value but `model` reaches the engine byte for byte.
Fields = dict[str, Any]
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])
_string = msgspec.json.Decoder(str | None)


class EngineCall:
    """The ASGI endpoint of every engine route."""

    def __init__(
        self,
        engine: Engine,
        pool: AdapterPool,
        base_model: str,
        catalogue: Callable[[], Catalogue],
        settings: GatewaySettings,
        passages: Passages,
        rollouts: Rollouts,
        peers: Peers | None = None,
    ) -> None:
        self._engine = engine
        self._pool = pool
        self._base_model = base_model
        self._catalogue = catalogue
        self._settings = settings
        self._passages = passages
        self._rollouts = rollouts
        self._peers = peers
        self._shadows = Shadows(engine, pool, rollouts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._engine.is_dead:
            await asyncio.sleep(_SILENCE_S)
            raise EngineUnavailable
        check_meant(scope, self._peers.replica if self._peers else None)
        body = await read_body(receive, self._settings.max_body_bytes, self._settings.body_timeout_s)
        fields = parse_fields(body)
        if wants_prompt_logprobs(fields) and not self._engine.gives_prompt_logprobs:
            raise PromptLogprobsUnavailable
        client = Client(receive)
        with self._passages.readers.watched(send) as watched, client.watched(scope):
            told = client.telling(watched)
            caller = caller_of(scope)
            choice = self._resolve(requested_model(fields), caller, key_of(scope))
            if choice is None:
                record_of(scope).means(BASE, self._base_model, caller)
                await self._run_base(scope, fields, body, client, told)
            else:
                record_of(scope).means(choice.adapter.name, choice.adapter.engine_name, caller)
                await self._run_adapter(choice, scope, fields, client, told)

    def _resolve(self, model: str | None, caller: str, key: Key | None) -> Choice | None:
        """None for the base model. What the caller's key may not use does not exist for it."""
        catalogue = self._catalogue()
        if model is None or model == self._base_model:
            if key is None or key.may_use(self._base_model):
                return None
            raise UnknownModel(model or "", known_models(self._base_model, catalogue, key))
        requested = RequestedModel.parse(model)
        adapter = catalogue.resolve(requested)
        if adapter is None or (key is not None and not key.may_use(adapter.name)):
            raise UnknownModel(model, known_models(self._base_model, catalogue, key))
        return Choice(adapter) if requested.revision else self._rollouts.choose(catalogue, adapter, caller)

    async def _run_base(self, scope: Scope, fields: Fields, body: bytes, client: Client, send: Send) -> None:
        async with self._passages.open(scope, self._base_model, fields, len(body)) as passage:
            client.body = with_added(body, fields, passage)
            async with self._passages.places.place(caller_of(scope), self._base_model) as leave:
                told = saying(self._base_model, record_of(scope), passage.telling(send, leave))
                await self._run(scope, client, told, send)

    async def _run_adapter(self, choice: Choice, scope: Scope, fields: Fields, client: Client, send: Send) -> None:
        adapter = choice.adapter
        fields |= {"model": adapter.engine_name}
        body = msgspec.json.encode(fields)
        if await self._passed_on(adapter, with_content_length(scope, len(body)), body, record_of(scope), send):
            return  # whoever answers counts it
        async with self._passages.open(scope, adapter.name, fields, len(body)) as passage:
            client.body = with_added(body, fields, passage)
            witness = await self._run_on(choice, passage, scope, client, send)
        if choice.shadow:
            self._shadows.send_copy(choice.shadow, scope, fields, witness.body)

    async def _run_on(self, choice: Choice, passage: Passage, scope: Scope, client: Client, send: Send) -> Witness:
        adapter, caller = choice.adapter, caller_of(scope)
        record = record_of(scope)
        record.queues(self._pool.level_of(adapter))
        async with self._pool.use(adapter, caller), self._passages.places.place(caller, adapter.name) as leave:
            record.runs()
            told = saying(adapter.engine_name, record, passage.telling(send, leave))
            witness = Witness(told, keeps_body=choice.shadow is not None)
            try:
                await self._run(scope, client, witness.send, send if choice.shadow is None else witness.send)
            except asyncio.CancelledError:
                raise  # a caller that leaves says nothing about a revision
            except Exception:
                self._rollouts.seen(adapter, witness.outcome(failed=True))
                raise
            self._rollouts.seen(adapter, witness.outcome())
        return witness

    async def _passed_on(
        self, adapter: AdapterRevision, scope: Scope, body: bytes, record: RequestRecord, send: Send
    ) -> bool:
        """Whether a replica that holds the adapter has answered, where this one would have to evict or to wait."""
        if self._peers is None or self._pool.is_at_hand(adapter) or forwarded_to(scope) is not None:
            return False
        holder = await self._peers.holder_of(adapter)
        if holder is not None and await self._peers.pass_on(holder, scope, body, record.watching(send)):
            record.forwarded = True
        return record.forwarded

    async def _run(self, scope: Scope, client: Client, send: Send, straight: Send) -> None:
        """Raises CancelledError also for a caller that the engine saw leave. `straight`: see DeadEngineGuard."""
        guard = DeadEngineGuard(self._engine, scope["path"], send, straight)
        assert client.body is not None
        sent = with_content_length(scope, len(client.body))
        running = asyncio.ensure_future(self._engine.api(sent, client.receive, guard.send))
        try:
            await asyncio.shield(running)
        except asyncio.CancelledError:
            # vLLM waits for the http.disconnect message and would let a cancelled request run to its end.
            client.left()
            await asyncio.wait({running}, timeout=_ABORT_TIMEOUT_S)
            running.cancel()
            raise
        if guard.replaced:
            record_of(scope).failed(EngineUnavailable.code, EngineUnavailable.status)
        elif client.has_left:
            raise asyncio.CancelledError


class DeadEngineGuard:
    """Keeps back the 500 of an engine that died under the request. If the replica is still there after a while, it
    becomes a 503."""

    def __init__(self, engine: Engine, path: str, send: Send, straight: Send) -> None:
        """`straight`: what `send` comes to for the pieces between the first and the last of a body."""
        self._engine = engine
        self._path = path
        self._send = send
        self._straight = straight
        self._is_between = False
        self.replaced = False

    def send(self, message: Message) -> Awaitable[None]:
        if self._is_between and message.get("more_body"):
            return self._straight(message)
        starts = message["type"] == "http.response.start"
        if self.replaced or (starts and message["status"] >= 500 and self._engine.is_dead):
            return self._replace()
        self._is_between = bool(message.get("body"))
        return self._send(message)

    async def _replace(self) -> None:
        if not self.replaced:
            self.replaced = True
            await asyncio.sleep(_SILENCE_S)
            await _send_unavailable(self._path, self._send)


def with_added(body: bytes, fields: Fields, passage: Passage) -> bytes:
    """The body, which is `fields`, with what its passage adds; written again only for that."""
    return msgspec.json.encode(fields | passage.added) if passage.added else body


def known_models(base_model: str, catalogue: Catalogue, key: Key | None) -> set[str]:
    """Names that the caller may learn of."""
    names = {base_model, *(current.name for current in catalogue.current)}
    return names if key is None else {name for name in names if key.may_use(name)}


def saying(model: str, record: RequestRecord, send: Send) -> Send:
    """`send` with the header that tells what answered, whole or streaming, seen by the record."""
    return record.watching(send, (MODEL_HEADER, model.encode()))


async def _send_unavailable(path: str, send: Send) -> None:
    response = error_response(EngineUnavailable(), path)
    await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
    await send({"type": "http.response.body", "body": response.body})


async def read_body(receive: Receive, limit_bytes: int, timeout_s: float) -> bytes:
    """The whole request body. Raises BodyTooLarge as soon as it is, and BodyTooSlow; a client that leaves ends the
    task."""
    try:
        async with asyncio.timeout(timeout_s):
            return await _whole(receive, limit_bytes)
    except TimeoutError:
        raise BodyTooSlow(timeout_s) from None


async def _whole(receive: Receive, limit_bytes: int) -> bytes:
    pieces: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise asyncio.CancelledError
        piece = message.get("body", b"")
        size += len(piece)
        if size > limit_bytes:
            raise BodyTooLarge(limit_bytes)
        pieces.append(piece)
        if not message.get("more_body"):
            return b"".join(pieces)


def parse_fields(body: bytes) -> Fields:
    """The top level of a JSON object, values unparsed. Raises InvalidBody."""
    try:
        fields = _fields.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise InvalidBody("The request body must be a JSON object.") from None
    except RecursionError:
        raise InvalidBody("The request body is nested too deeply.") from None
    for name, value in fields.items():
        if _is_too_large(memoryview(value)):
            raise InvalidBody(f"`{name}` is a number of more than 64 bits.")
    return fields


def _is_too_large(value: memoryview) -> bool:
    """For the message in which vLLM sends parameters to its engine core: an integer of more than 64 bits."""
    if len(value) < _DIGITS_OF_64_BITS or value[0] not in b"-0123456789":
        return False
    number = bytes(value)
    digits, most = (number[1:], 2**63) if number.startswith(b"-") else (number, 2**64 - 1)
    return digits.isdigit() and (len(digits) > _DIGITS_OF_64_BITS or int(digits) > most)


def requested_model(fields: Fields) -> str | None:
    """The `model` of a request; None where it is absent, which means the base model. Raises InvalidBody."""
    with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError):
        return _string.decode(fields["model"]) if "model" in fields else None
    raise InvalidBody("`model` must be a string.")
