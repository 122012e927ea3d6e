"""The admin API of pools: which there are, and adding and removing them while the server runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from convert.artifact import Name
from serve.admin.routes import Admin, parse_body
from serve.catalogue.entry import Audit
from serve.settings import PoolOptions

_MAX_REASON_CHARACTERS = 500

PoolState = Literal["starting", "running", "asleep", "failed", "stopping"]


class NewPool(PoolOptions):
    """The body of a call that adds a pool."""

    path: Path = Field(description="An artifact on the server's machine, below a directory that it takes them from.")
    name: Name | None = Field(None, description="What clients write as `model`; default: the artifact's own name.")
    replicas: Annotated[int, Field(ge=1, le=64)] = 1
    max_lora_rank: Annotated[int, Field(ge=0, le=512)] | None = Field(
        None, description="Largest rank of its adapters; default: what the artifact and the published ones need."
    )
    reason: str = Field("", max_length=_MAX_REASON_CHARACTERS)


class MoveBody(BaseModel):
    """The body of a call that points an alias to a pool."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pool: Name = Field(description="The base model or merged model of the pool.")
    reason: str = Field("", max_length=_MAX_REASON_CHARACTERS)


class PoolView(BaseModel):
    """A pool as the admin API shows it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str  # of its base model or merged model
    base: str  # fingerprint of the model
    kind: Literal["base model", "merged model"]
    added: bool  # while the server ran; false: the server was started with it
    state: PoolState
    replicas: int
    max_lora_rank: int
    max_active_adapters: int
    max_resident_adapters: int
    sleep_after_s: float | None
    vllm_args: tuple[str, ...]  # of its own, which vLLM gets after those of the server
    ready: int  # replicas that answer
    reason: str = ""  # why it failed, or why the last attempt did, if it is tried again


class Pools(Protocol):
    """The pools of a running server. Every method raises StoreUnavailable if the catalogue can't be read."""

    async def add(self, pool: NewPool, audit: Audit) -> PoolView:
        """Records the pool, and returns while it starts. Raises PathRefused, PoolRefused or TransitionRefused."""
        ...

    async def remove(self, name: str, audit: Audit) -> None:
        """Records that the pool is not wanted any more. Raises PoolRefused, TransitionRefused or UnknownModel."""
        ...

    async def move(self, name: str, pool: str, audit: Audit) -> int:
        """Points an alias to a pool that runs, and returns when every replica follows: the number of replicas. Raises
        TransitionRefused, UnknownModel or PublishUnconfirmed."""
        ...

    async def all(self) -> Sequence[PoolView]:
        """Those that there should be, in the order of their names."""
        ...


class PoolRoutes:
    """The endpoints. Every call needs an admin token."""

    def __init__(self, admin: Admin, pools: Pools) -> None:
        self._admin = admin
        self._pools = pools

    def routes(self) -> list[Route]:
        path = "/admin/v1/pools"
        return [
            Route(path, self.list_pools, methods=["GET"]),
            Route(path, self.add, methods=["POST"]),
            Route(f"{path}/{{name}}", self.remove, methods=["DELETE"]),
            Route("/admin/v1/adapters/{name}/move", self.move, methods=["POST"]),
        ]

    async def list_pools(self, request: Request) -> Response:
        self._admin.caller(request)
        return JSONResponse({"pools": [pool.model_dump() for pool in await self._pools.all()]})

    async def add(self, request: Request) -> Response:
        """Answers 202: the engines start after the answer."""
        caller = self._admin.caller(request)
        body = parse_body(NewPool, await request.body() or b"{}")
        return JSONResponse((await self._pools.add(body, Audit(caller, body.reason))).model_dump(), status_code=202)

    async def move(self, request: Request) -> Response:
        caller, name = self._admin.caller(request), request.path_params["name"]
        body = parse_body(MoveBody, await request.body() or b"{}")
        replicas = await self._pools.move(name, body.pool, Audit(caller, body.reason))
        return JSONResponse({"model": name, "pool": body.pool, "replicas": replicas})

    async def remove(self, request: Request) -> Response:
        name, reason = request.path_params["name"], request.query_params.get("reason", "")[:_MAX_REASON_CHARACTERS]
        await self._pools.remove(name, Audit(self._admin.caller(request), reason))
        return JSONResponse({"name": name, "state": "stopping"}, status_code=202)
