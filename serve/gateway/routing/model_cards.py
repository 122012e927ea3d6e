"""GET /v1/models: the base models of all pools, and the adapters of the catalogue, in the shape of OpenAI and vLLM."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from serve.callers.identity import key_of
from serve.catalogue.catalogue import Catalogue
from serve.errors import UnknownModel
from serve.gateway.routing.other_pools import OtherPools
from serve.gateway.routing.resolver import ModelResolver
from serve.names import AdapterRevision, RequestedModel
from serve.settings import EngineSettings

Card = dict[str, Any]


class ModelCards:
    """The two routes."""

    def __init__(
        self,
        engine: EngineSettings,
        context_tokens: Callable[[], int],
        catalogue: Callable[[], Catalogue],
        models: ModelResolver,
        other_pools: OtherPools,
    ) -> None:
        """`engine`, `context_tokens`: of this replica's own pool."""
        self._catalogue = catalogue
        self._models = models
        self._own = engine
        self._context_tokens = context_tokens
        self._other_pools = other_pools
        self._created: dict[str, int] = {}
        self._list: tuple[object, bytes] = (None, b"")  # what it was made of, response body

    def routes(self) -> list[Route]:
        return [Route("/v1/models", self.list_models), Route("/v1/models/{name}", self.get_model)]

    async def list_models(self, request: Request) -> Response:
        catalogue, tokens = self._catalogue(), await self._tokens()
        if (key := key_of(request.scope)) is not None:
            return JSONResponse(model_list(self._all(catalogue, tokens, key.may_use)))
        # There may be thousands of adapters, and they change seldom.
        if self._list[0] != (made_of := (catalogue.epoch, tokens)):
            cards = self._all(catalogue, tokens, lambda _: True)
            self._list = (made_of, bytes(JSONResponse(model_list(cards)).body))
        return Response(self._list[1], media_type="application/json")

    async def get_model(self, request: Request) -> Response:
        """The model of that name; or the revision, under the name that an answer's `model` has."""
        name, key, catalogue = request.path_params["name"], key_of(request.scope), self._catalogue()
        tokens, requested = await self._tokens(), RequestedModel.parse(name)
        engine = next((engine for engine in self._engines().values() if engine.model_name == name), None)
        adapter = catalogue.resolve(requested)
        if (adapter is None and engine is None) or (key is not None and not key.may_use(requested.name)):
            raise UnknownModel(name, self._models.known(key))
        if engine or adapter is None:
            return JSONResponse(self._base_card(engine or self._own, tokens))
        if requested.revision is None and (pool := self._pool_of_name(catalogue, adapter.name)):
            return JSONResponse(self._card_of_moved(adapter.name, pool, tokens))
        card = self._card(catalogue, self._engines(), adapter, tokens)
        return JSONResponse(card | {"id": card["root"]} if requested.revision else card)

    async def _tokens(self) -> Mapping[str, int | None]:
        """The context of each base model, as far as it is known."""
        others = {pool.base: await pool.context_tokens() for pool in self._other_pools.all()}
        return {self._own.fingerprint: self._context_tokens(), **others}

    def _engines(self) -> Mapping[str, EngineSettings]:
        """Those of all pools, by the fingerprint of the base model."""
        others = (pool.settings.engine for pool in self._other_pools.all())
        return {engine.fingerprint: engine for engine in (self._own, *others)}

    def _all(
        self, catalogue: Catalogue, tokens: Mapping[str, int | None], may_use: Callable[[str], bool]
    ) -> list[Card]:
        """The models whose names a caller may use, in an order that is the same in every replica."""
        by_base = self._engines()
        engines = sorted(by_base.values(), key=lambda engine: engine.model_name)
        bases = [self._base_card(engine, tokens) for engine in engines if may_use(engine.model_name)]
        adapters = sorted(adapter for adapter in catalogue.current if may_use(adapter.name))
        cards = []
        for adapter in adapters:
            pool = self._pool_of_name(catalogue, adapter.name)
            moved = pool and self._card_of_moved(adapter.name, pool, tokens)
            cards.append(moved or self._card(catalogue, by_base, adapter, tokens))
        return [*bases, *cards]

    def _pool_of_name(self, catalogue: Catalogue, name: str) -> EngineSettings | None:
        """The engine of the pool that an alias points to."""
        model = catalogue.state_of(name).pool
        return next((engine for engine in self._engines().values() if engine.model_name == model), None)

    def _card_of_moved(self, name: str, pool: EngineSettings, tokens: Mapping[str, int | None]) -> Card:
        return model_card(name, pool.model_name, None, self._created_at(pool), tokens.get(pool.fingerprint))

    def _base_card(self, engine: EngineSettings, tokens: Mapping[str, int | None]) -> Card:
        name, base = engine.model_name, engine.fingerprint
        return model_card(name, name, None, self._created_at(engine), tokens.get(base))

    def _created_at(self, engine: EngineSettings) -> int:
        """The time of the model's files and not of the start, because it must be the same in every replica; 0 while the
        files can't be reached."""
        if engine.fingerprint not in self._created:
            try:
                self._created[engine.fingerprint] = int(engine.model_path.stat().st_mtime)
            except OSError:
                return 0
        return self._created[engine.fingerprint]

    def _card(
        self,
        catalogue: Catalogue,
        engines: Mapping[str, EngineSettings],
        current: AdapterRevision,
        tokens: Mapping[str, int | None],
    ) -> Card:
        engine = engines.get(catalogue.candidate(current).base, self._own)
        revision = catalogue.revision(current)
        created = int(revision.at.timestamp()) if revision else self._created_at(engine)
        context = tokens.get(engine.fingerprint)
        return model_card(current.name, current.engine_name, engine.model_name, created, context)


def model_card(name: str, root: str, parent: str | None, created: int, context_tokens: int | None) -> Card:
    """One model as GET /v1/models lists it, with the fields that vLLM adds: `root`, what the name stands for (in vLLM a
    path, which callers need not know); `parent`, the base model of an adapter; `max_model_len`, the tokens of a prompt
    and its answer together, null while no replica of its pool has said it. `created` is in Unix seconds."""
    return {
        "id": name, "object": "model", "created": created, "owned_by": "graft", "root": root, "parent": parent,
        "max_model_len": context_tokens, "permission": [],
    }  # fmt: skip


def model_list(cards: Iterable[Card]) -> Card:
    return {"object": "list", "data": list(cards)}
