"""The ASGI application of a replica: the public routes, and none of the engine's other routes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.adapters.pool import AdapterPool
from serve.adapters.rollout import Rollouts
from serve.admin.routes import Admin
from serve.admin.usage_routes import UsageRoutes
from serve.admin.vllm_compat import VllmRoutes
from serve.callers.identity import key_of
from serve.callers.keys import KeyRing
from serve.callers.oidc import Issuer
from serve.catalogue.catalogue import Catalogue
from serve.engine.protocol import Engine
from serve.errors import EngineUnavailable, MethodNotAllowed, ServeError, TaskUnsupported, UnknownModel, UnknownRoute
from serve.gateway import openapi
from serve.gateway.auth_middleware import Authentication
from serve.gateway.dispatch import EngineCall, ModelResolver
from serve.gateway.peer_forwarding import Peers
from serve.gateway.public_routes import ENGINE_ROUTES, error_response, model_card, model_list
from serve.gateway.request_policy import RequestPolicy
from serve.gateway.telemetry_middleware import TelemetryMiddleware
from serve.names import AdapterRevision, RequestedModel
from serve.observability.access_log import AccessLog
from serve.observability.recorder import MetricsRecorder
from serve.observability.request_record import record_of
from serve.observability.tracing import Tracer
from serve.settings import GatewaySettings, ServeSettings

logger = logging.getLogger(__name__)

_LIMIT_HEADERS = [
    f"x-ratelimit-{value}-{unit}" for value in ("limit", "remaining", "reset") for unit in ("requests", "tokens")
]


class Gateway:
    """Forwards the ASGI lifespan to the engine's application, and offers callers the routes of `_routes`."""

    def __init__(
        self,
        settings: ServeSettings,
        engine: Engine,
        pool: AdapterPool,
        catalogue: Callable[[], Catalogue],
        admin: Admin,
        rollouts: Rollouts | None = None,
        peers: Peers | None = None,
        policy: RequestPolicy | None = None,
        recorder: MetricsRecorder | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        """`rollouts`: canaries and shadows, which the replica's reports contain; `peers`: the other replicas, if there
        are any; `policy`: by default one that shares no limits or usage with other replicas. Raises KeysInvalid."""
        self._engine = engine
        self._catalogue = catalogue
        self._base_model = settings.engine.model_name
        # The time of the model's files and not of the start, because it must be the same in every replica.
        self._base_created = int(settings.engine.model_path.stat().st_mtime)
        self._model_list: tuple[int, bytes] = (-1, b"")  # catalogue epoch, response body
        self.policy = policy or RequestPolicy(settings.gateway, engine)
        document = openapi.document(engine.openapi, with_keys=settings.gateway.knows_callers)
        self._openapi = bytes(JSONResponse(document).body)
        rollouts = rollouts or Rollouts(admin.give_up)
        self._models = ModelResolver(self._base_model, catalogue, rollouts)
        call = EngineCall(engine, pool, self._models, self.policy, rollouts, peers)
        http = Starlette(routes=self._routes(call, admin), exception_handlers=_EXCEPTION_HANDLERS)
        http.router.redirect_slashes = False  # it would redirect to an address made of the `Host` header
        engine_routes = EngineRoutes(call, openapi.offered_routes(engine.openapi), http, self.policy)
        recorder = recorder or MetricsRecorder(settings.metrics.max_adapters)
        access_log = AccessLog(settings.log.access_sample)
        self.keys = KeyRing(settings.gateway.keys_file) if settings.gateway.keys_file else None
        self.issuer = Issuer(settings.gateway.oidc) if settings.gateway.oidc else None
        app = with_middleware(engine_routes, settings.gateway, self.keys, self.issuer)
        self._http = TelemetryMiddleware(app, recorder, access_log, tracer)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._engine.api(scope, receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _routes(self, call: ASGIApp, admin: Admin) -> list[Route]:
        offered = openapi.offered_routes(self._engine.openapi)
        return [
            *(Route(path, call, methods=["POST"]) for path in offered),
            *(Route(path, _unsupported_task, methods=["POST"]) for path in ENGINE_ROUTES if path not in offered),
            Route("/openapi.json", self._describe),
            Route("/health", self._health),
            Route("/v1/models", self._list_models),
            Route("/v1/models/{name}", self._get_model),
            *admin.routes(),
            *VllmRoutes(admin, self._base_model).routes(),
            *(UsageRoutes(admin, self.policy.meter).routes() if self.policy.meter else ()),
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
        if self._model_list[0] != catalogue.epoch:  # there may be thousands of adapters, and they change seldom
            cards = self._cards(catalogue, lambda _: True)
            self._model_list = (catalogue.epoch, bytes(JSONResponse(model_list(cards)).body))
        return Response(self._model_list[1], media_type="application/json")

    async def _get_model(self, request: Request) -> Response:
        """The model of that name; or the revision, under the name that an answer's `model` has."""
        name, key, catalogue = request.path_params["name"], key_of(request.scope), self._catalogue()
        requested = RequestedModel.parse(name)
        adapter = catalogue.resolve(requested)
        is_base = name == self._base_model
        if (adapter is None and not is_base) or (key is not None and not key.may_use(requested.name)):
            raise UnknownModel(name, self._models.known(key))
        if is_base or adapter is None:
            return JSONResponse(self._base_card())
        card = self._card(catalogue, adapter)
        return JSONResponse(card | {"id": card["root"]} if requested.revision else card)

    def _cards(self, catalogue: Catalogue, may_use: Callable[[str], bool]) -> list[dict[str, object]]:
        """The models whose names a caller may use."""
        base = [self._base_card()] if may_use(self._base_model) else []
        adapters = sorted(adapter for adapter in catalogue.current if may_use(adapter.name))
        return [*base, *(self._card(catalogue, adapter) for adapter in adapters)]

    def _base_card(self) -> dict[str, object]:
        tokens = self._engine.context_tokens
        return model_card(self._base_model, self._base_model, None, self._base_created, tokens)

    def _card(self, catalogue: Catalogue, current: AdapterRevision) -> dict[str, object]:
        revision = catalogue.revision(current)
        created = int(revision.at.timestamp()) if revision else self._base_created
        tokens = self._engine.context_tokens
        return model_card(current.name, current.engine_name, self._base_model, created, tokens)


class EngineRoutes:
    """Calls the endpoint of the engine's routes directly. Starlette would wrap `send`, which is called for each token,
    in layers of its own. The bodies of all other routes have the same limits."""

    def __init__(self, call: ASGIApp, paths: Iterable[str], others: ASGIApp, policy: RequestPolicy) -> None:
        self._call = call
        self._paths = frozenset(paths)
        self._others = others
        self._policy = policy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] != "POST" or scope["path"] not in self._paths:
            with self._policy.limited(scope, receive) as limited:
                await self._others(scope, limited, send)
            return
        try:
            await self._call(scope, receive, send)
        except Exception as error:
            has_started = record_of(scope).status != 0
            handle = _serve_error if isinstance(error, ServeError) and not has_started else _unexpected_error
            response = await handle(Request(scope), error)
            if not has_started:
                await response(scope, receive, send)
            if handle is _unexpected_error:
                raise


def with_middleware(app: ASGIApp, settings: GatewaySettings, keys: KeyRing | None, issuer: Issuer | None) -> ASGIApp:
    """The application behind the authentication and the CORS headers that the settings ask for."""
    if keys or issuer:
        app = Authentication(app, keys, issuer)
    if settings.cors_origins:
        # Outermost: a browser sends its preflight request without a key.
        app = CORSMiddleware(
            app,
            allow_origins=settings.cors_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=("x-request-id", "x-graft-model", "retry-after", *_LIMIT_HEADERS),
        )
    return app


async def _unsupported_task(request: Request) -> Response:
    raise TaskUnsupported(request.url.path)


async def _serve_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServeError)
    record_of(request.scope).failed(error.code, error.status)
    return error_response(error, request.url.path)


async def _http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    method, path = request.method, request.scope["path"]
    if allowed := _methods_of(request, path):
        return await _serve_error(request, MethodNotAllowed(method, path, allowed))
    if _methods_of(request, without_slash := path.rstrip("/")):
        # As vLLM does. Relative, because a proxy in front may have another scheme, host or port.
        query = request.url.query
        return RedirectResponse(f"{without_slash}?{query}" if query else without_slash, status_code=307)
    return await _serve_error(request, UnknownRoute(method, path))


def _methods_of(request: Request, path: str) -> set[str]:
    """The methods of all routes that match a path."""
    scope = {**request.scope, "path": path}
    routes = [route for route in request.app.routes if route.matches(scope)[0] is not Match.NONE]
    return {method for route in routes for method in route.methods}


async def _unexpected_error(request: Request, error: Exception) -> Response:
    # The cause is logged and never sent to the caller.
    logger.error("request failed", exc_info=error, extra={"request_id": record_of(request.scope).id})
    return await _serve_error(request, ServeError("The server had an error while processing the request."))


_EXCEPTION_HANDLERS = {ServeError: _serve_error, HTTPException: _http_exception, Exception: _unexpected_error}
