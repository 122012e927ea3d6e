"""The ASGI application of a replica: the public routes, and none of the engine's other routes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

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
from serve.errors import (
    EngineUnavailable,
    MethodNotAllowed,
    PoolUnavailable,
    ServeError,
    UnknownModel,
    UnknownRoute,
)
from serve.gateway import openapi
from serve.gateway.auth_middleware import Authentication
from serve.gateway.dispatch import EngineCall
from serve.gateway.public_routes import ENGINE_ROUTES, error_response
from serve.gateway.request_policy import RequestPolicy
from serve.gateway.routing.model_cards import ModelCards
from serve.gateway.routing.other_pools import OtherPools
from serve.gateway.routing.peers import Peers
from serve.gateway.routing.resolver import ModelResolver
from serve.gateway.telemetry_middleware import TelemetryMiddleware
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
        other_pools: OtherPools | None = None,
        pool_routes: Sequence[Route] = (),
    ) -> None:
        """`rollouts`: canaries and shadows, which the replica's reports contain; `peers`: the other replicas of the
        server, if there are any, and `other_pools` theirs; `pool_routes`: to change pools; `policy`: by default
        one that shares no limits or usage with other replicas. Raises KeysInvalid."""
        self._engine = engine
        self.policy = policy or RequestPolicy(settings.gateway, engine)
        document = openapi.document(engine.openapi, with_keys=settings.gateway.knows_callers)
        self._openapi = bytes(JSONResponse(document).body)
        rollouts = rollouts or Rollouts(admin.give_up)
        self._other_pools = other_pools = other_pools or OtherPools(settings, catalogue, None)
        self._models = models = ModelResolver(settings.engine.model_name, catalogue, rollouts, other_pools)
        self._cards = ModelCards(settings.engine, lambda: engine.context_tokens, catalogue, models, other_pools)
        offered = openapi.offered_routes(engine.openapi)
        call = EngineCall(engine, pool, models, self.policy, rollouts, peers, offered)
        # All of them: the engines of other pools may offer more than this one.
        routes = [*self._routes(call, admin), *pool_routes]
        http = Starlette(routes=routes, exception_handlers=_EXCEPTION_HANDLERS)
        http.router.redirect_slashes = False  # it would redirect to an address made of the `Host` header
        engine_routes = EngineRoutes(call, ENGINE_ROUTES, http, self.policy)
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
            await self._http(without_root_path(scope), receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _routes(self, call: ASGIApp, admin: Admin) -> list[Route]:
        return [
            *(Route(path, call, methods=["POST"]) for path in ENGINE_ROUTES),
            Route("/openapi.json", self._describe),
            Route("/health", self._health),
            Route("/health/{name}", self._pool_health),
            *self._cards.routes(),
            *admin.routes(),
            *VllmRoutes(admin).routes(),
            *(UsageRoutes(admin, self.policy.meter).routes() if self.policy.meter else ()),
        ]

    async def _health(self, _: Request) -> Response:
        if self._engine.is_dead:
            raise EngineUnavailable
        return Response(status_code=200)

    async def _pool_health(self, request: Request) -> Response:
        """Whether the pool of a base model has a replica that answers. Raises UnknownModel or PoolUnavailable."""
        name, key = request.path_params["name"], key_of(request.scope)
        pool = self._other_pools.named(name)
        if (pool is None and name != self._models.base_model) or (key is not None and not key.may_use(name)):
            raise UnknownModel(name, self._models.known(key))
        if pool is None:
            return await self._health(request)
        if not await pool.is_ready():
            raise PoolUnavailable(name)
        return Response(status_code=200)

    async def _describe(self, _: Request) -> Response:
        return Response(self._openapi, media_type="application/json")


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


def without_root_path(scope: Scope) -> Scope:
    """The scope of a request to a pool whose paths begin with a prefix, as if they did not."""
    root = scope.get("root_path", "")
    if not root or not scope["path"].startswith(root):
        return scope
    path = scope["path"].removeprefix(root)
    return {**scope, "root_path": "", "path": path, "raw_path": path.encode()}


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
