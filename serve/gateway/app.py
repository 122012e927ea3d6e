"""The ASGI application of a replica: the public routes, and nothing else of what the engine offers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from serve import openapi
from serve.access import AccessLog
from serve.admin import Admin
from serve.authentication import Authentication
from serve.caller import key_of
from serve.catalogue import Catalogue
from serve.config import GatewaySettings, ServeSettings
from serve.engine import Engine
from serve.engine_call import EngineCall, known_models
from serve.errors import EngineUnavailable, MethodNotAllowed, ServeError, TaskUnsupported, UnknownModel, UnknownRoute
from serve.forward import Peers
from serve.keys import KeyRing
from serve.names import AdapterRevision, RequestedModel
from serve.observed import Observed
from serve.oidc import Issuer
from serve.openai import ENGINE_ROUTES, error_response, model_card, model_list
from serve.passage import Passages
from serve.recorder import Recorder
from serve.request_record import record_of
from serve.residency import AdapterPool
from serve.rollout import Rollouts
from serve.tracing import Tracer
from serve.usage_routes import UsageRoutes
from serve.vllm_routes import VllmRoutes

logger = logging.getLogger(__name__)

_LIMIT_HEADERS = [
    f"x-ratelimit-{what}-{kind}" for what in ("limit", "remaining", "reset") for kind in ("requests", "tokens")
]


class Gateway:
    """Hands the engine's application its lifespan, and callers the routes of `_routes`."""

    def __init__(
        self,
        settings: ServeSettings,
        engine: Engine,
        pool: AdapterPool,
        catalogue: Callable[[], Catalogue],
        admin: Admin,
        rollouts: Rollouts | None = None,
        peers: Peers | None = None,
        passages: Passages | None = None,
        recorder: Recorder | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        """`rollouts` is what the replica's reports tell of; `peers` are the other replicas, if there are any;
        `passages` is what they share of limits and usage, by default nothing. Raises KeysInvalid."""
        self._engine = engine
        self._catalogue = catalogue
        self._base_model = settings.engine.model_name
        # Every replica tells the same.
        self._base_made = int(settings.engine.model_path.stat().st_mtime)
        self._listed: tuple[int, bytes] = (-1, b"")
        self.passages = passages or Passages(settings.gateway, engine)
        document = openapi.document(engine.openapi, with_keys=settings.gateway.knows_callers)
        self._openapi = bytes(JSONResponse(document).body)
        rollouts = rollouts or Rollouts(admin.give_up)
        call = EngineCall(engine, pool, self._base_model, catalogue, settings.gateway, self.passages, rollouts, peers)
        http = Starlette(routes=self._routes(call, admin), exception_handlers=_EXCEPTION_HANDLERS)
        http.router.redirect_slashes = False  # a path is public as it is listed, or not at all
        direct = EngineRoutes(call, openapi.offered(engine.openapi), http)
        recorder = recorder or Recorder(settings.metrics.max_adapters)
        access = AccessLog(settings.log.access_sample)
        self.keys = KeyRing(settings.gateway.keys_file) if settings.gateway.keys_file else None
        self._http = Observed(guarded(direct, settings.gateway, self.keys), recorder, access, tracer)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._engine.api(scope, receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _routes(self, call: ASGIApp, admin: Admin) -> list[Route]:
        offered = openapi.offered(self._engine.openapi)
        return [
            *(Route(path, call, methods=["POST"]) for path in offered),
            *(Route(path, _not_offered, methods=["POST"]) for path in ENGINE_ROUTES if path not in offered),
            Route("/openapi.json", self._describe),
            Route("/health", self._health),
            Route("/v1/models", self._list_models),
            Route("/v1/models/{name}", self._get_model),
            *admin.routes(),
            *VllmRoutes(admin, self._base_model).routes(),
            *(UsageRoutes(admin, self.passages.meter).routes() if self.passages.meter else ()),
        ]

    async def _health(self, _: Request) -> Response:
        if self._engine.is_dead:
            raise EngineUnavailable
        return Response(status_code=200)

    async def _describe(self, _: Request) -> Response:
        return Response(self._openapi, media_type="application/json")

    async def _list_models(self, request: Request) -> Response:
        catalogue = self._catalogue()
        if (key := key_of(request.scope)) is not None:
            return JSONResponse(model_list(self._cards(catalogue, key.may_use)))
        if self._listed[0] != catalogue.epoch:  # thousands of adapters, and seldom a new one
            everything = self._cards(catalogue, lambda _: True)
            self._listed = (catalogue.epoch, bytes(JSONResponse(model_list(everything)).body))
        return Response(self._listed[1], media_type="application/json")

    async def _get_model(self, request: Request) -> Response:
        name, key, catalogue = request.path_params["name"], key_of(request.scope), self._catalogue()
        current = catalogue.resolve(RequestedModel(name))
        is_base = name == self._base_model
        if (current is None and not is_base) or (key is not None and not key.may_use(name)):
            raise UnknownModel(name, known_models(self._base_model, catalogue, key))
        return JSONResponse(self._base_card() if is_base or current is None else self._card(catalogue, current))

    def _cards(self, catalogue: Catalogue, may_use: Callable[[str], bool]) -> list[dict[str, object]]:
        """What there is for a caller who may use those names."""
        base = [self._base_card()] if may_use(self._base_model) else []
        mine = sorted(it for it in catalogue.current if may_use(it.name))
        return [*base, *(self._card(catalogue, current) for current in mine)]

    def _base_card(self) -> dict[str, object]:
        return model_card(self._base_model, self._base_model, None, self._base_made)

    def _card(self, catalogue: Catalogue, current: AdapterRevision) -> dict[str, object]:
        revision = catalogue.revision(current)
        published = int(revision.at.timestamp()) if revision else self._base_made
        return model_card(current.name, current.engine_name, self._base_model, published)


class EngineRoutes:
    """What an application of routes does for the engine's, without the layers that it puts around each piece of an
    answer: there is a piece for each token."""

    def __init__(self, call: ASGIApp, paths: Iterable[str], others: ASGIApp) -> None:
        self._call = call
        self._paths = frozenset(paths)
        self._others = others

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] != "POST" or scope["path"] not in self._paths:
            await self._others(scope, receive, send)
            return
        try:
            await self._call(scope, receive, send)
        except Exception as error:
            is_begun = record_of(scope).status != 0
            tell = _serve_error if isinstance(error, ServeError) and not is_begun else _bug
            response = await tell(Request(scope), error)
            if not is_begun:
                await response(scope, receive, send)
            if tell is _bug:
                raise


def guarded(app: ASGIApp, settings: GatewaySettings, keys: KeyRing | None) -> ASGIApp:
    """The application as the settings let callers reach it."""
    if keys or settings.oidc:
        app = Authentication(app, keys, Issuer(settings.oidc) if settings.oidc else None)
    if settings.cors_origins:
        # Outermost: a browser asks beforehand, without a key.
        app = CORSMiddleware(
            app,
            allow_origins=settings.cors_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=("x-request-id", "x-graft-model", "retry-after", *_LIMIT_HEADERS),
        )
    return app


async def _not_offered(request: Request) -> Response:
    raise TaskUnsupported(request.url.path)


async def _serve_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServeError)
    record_of(request.scope).failed(error.code, error.status)
    return error_response(error, request.url.path)


async def _http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    told = MethodNotAllowed if error.status_code == 405 else UnknownRoute
    return await _serve_error(request, told(request.method, request.url.path))


async def _bug(request: Request, error: Exception) -> Response:
    # The cause goes to the log, never to the caller.
    logger.error("request failed", exc_info=error, extra={"request_id": record_of(request.scope).id})
    return await _serve_error(request, ServeError("The server had an error while processing the request."))


_EXCEPTION_HANDLERS = {ServeError: _serve_error, HTTPException: _http_exception, Exception: _bug}
