"""vLLM's own calls to load and unload an adapter, so that what drives vLLM drives Graft unchanged: same bodies, same
texts, but behind the admin token, in two phases on every replica, and with an entry in the catalogue.

What vLLM does under a name that is loaded (`load_inplace`) here is the next revision of it.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from convert.artifact import Name, problems_of
from serve.admin import Admin, PublishBody
from serve.entry import Cause
from serve.errors import InvalidBody, UnknownModel
from serve.names import RequestedModel

_NAME: TypeAdapter[str] = TypeAdapter(Name)
_CAUSE = "{} of vLLM's API"


class _Load(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    lora_name: str
    lora_path: str
    load_inplace: bool = False


class _Unload(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    lora_name: str
    lora_int_id: int | None = Field(default=None, description="vLLM's own number; it means nothing here.")


_Kind = TypeVar("_Kind", bound=BaseModel)


@dataclass(frozen=True)
class VllmRoutes:
    """POST /v1/load_lora_adapter and /v1/unload_lora_adapter."""

    admin: Admin
    base_model: str

    def routes(self) -> list[Route]:
        return [
            Route("/v1/load_lora_adapter", self.load, methods=["POST"]),
            Route("/v1/unload_lora_adapter", self.unload, methods=["POST"]),
        ]

    async def load(self, request: Request) -> Response:
        caller = self.admin.caller(request)
        body = _parse(_Load, await request.body())
        if not body.lora_name or not body.lora_path:
            return _refusal("Both 'lora_name' and 'lora_path' must be provided.")
        if body.lora_name == self.base_model:
            return _refusal(f"The lora adapter '{body.lora_name}' conflicts with a served base model.")
        if not body.load_inplace and await self._is_served(body.lora_name):
            return _refusal(
                f"The lora adapter '{body.lora_name}' has already been loaded. If you want to load the adapter in "
                "place, set 'load_inplace' to True."
            )
        try:
            name = _NAME.validate_python(body.lora_name)
        except ValidationError:
            return _refusal(f"'{body.lora_name}' can't be a name here: lower-case letters, digits, '.', '_', '-' only.")
        path = Path(body.lora_path)
        candidate = await self.admin.admit(PublishBody(path=path, name=name))
        await self.admin.control.publish(candidate, Cause(caller, _CAUSE.format("load_lora_adapter")))
        return Response(f"Success: LoRA adapter '{name}' added successfully.")

    async def unload(self, request: Request) -> Response:
        caller = self.admin.caller(request)
        body = _parse(_Unload, await request.body())
        if not body.lora_name:
            return _refusal("'lora_name' needs to be provided to unload a LoRA adapter.")
        try:
            await self.admin.control.retire(body.lora_name, Cause(caller, _CAUSE.format("unload_lora_adapter")))
        except UnknownModel:
            told = f"The lora adapter '{body.lora_name}' cannot be found."
            return _refusal(told, "NotFoundError", HTTPStatus.NOT_FOUND)
        return Response(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    async def _is_served(self, name: str) -> bool:
        catalogue = await asyncio.to_thread(self.admin.control.log.read)
        return catalogue.resolve(RequestedModel(name)) is not None


def _parse(kind: type[_Kind], body: bytes) -> _Kind:
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise InvalidBody(f"The body does not fit: {problems_of(error)}.") from error


def _refusal(message: str, kind: str = "InvalidUserInput", status: HTTPStatus = HTTPStatus.BAD_REQUEST) -> JSONResponse:
    """An error as vLLM shapes it: `code` is the status."""
    return JSONResponse(
        {"error": {"message": message, "type": kind, "param": None, "code": status.value}}, status_code=status
    )
