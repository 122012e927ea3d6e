"""vLLM's own calls to load and unload an adapter, so that a client of vLLM works with Graft unchanged.

Bodies and messages are vLLM's. But a call needs the admin token, changes all replicas in two phases, and is an entry of
the catalogue. A load under the name of a loaded adapter (`load_inplace`) publishes a new revision of that name.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from convert.artifact import Name
from serve.admin.routes import Admin, PublishBody, parse_body
from serve.catalogue.entry import Audit
from serve.errors import UnknownModel
from serve.names import RequestedModel

_NAME: TypeAdapter[str] = TypeAdapter(Name)
_REASON = "{} of vLLM's API"


class _LoadBody(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    lora_name: str
    lora_path: str
    load_inplace: bool = False


class _UnloadBody(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    lora_name: str
    lora_int_id: int | None = Field(default=None, description="vLLM's own number, which is ignored.")


@dataclass(frozen=True)
class VllmRoutes:
    """POST /v1/load_lora_adapter and /v1/unload_lora_adapter."""

    admin: Admin

    def routes(self) -> list[Route]:
        return [
            Route("/v1/load_lora_adapter", self.load, methods=["POST"]),
            Route("/v1/unload_lora_adapter", self.unload, methods=["POST"]),
        ]

    async def load(self, request: Request) -> Response:
        caller = self.admin.caller(request)
        body = parse_body(_LoadBody, await request.body())
        if not body.lora_name or not body.lora_path:
            return _error_response("Both 'lora_name' and 'lora_path' must be provided.")
        if self.admin.admission.is_base_model(body.lora_name):
            return _error_response(f"The lora adapter '{body.lora_name}' conflicts with a served base model.")
        if not body.load_inplace and await self._is_served(body.lora_name):
            return _error_response(
                f"The lora adapter '{body.lora_name}' has already been loaded. If you want to load the adapter in "
                "place, set 'load_inplace' to True."
            )
        try:
            name = _NAME.validate_python(body.lora_name)
        except ValidationError:
            return _error_response(
                f"'{body.lora_name}' can't be a name here: lower-case letters, digits, '.', '_', '-' only."
            )
        path = Path(body.lora_path)
        candidate = await self.admin.admit(PublishBody(path=path, name=name))
        await self.admin.control.publish(candidate, Audit(caller, _REASON.format("load_lora_adapter")))
        return Response(f"Success: LoRA adapter '{name}' added successfully.")

    async def unload(self, request: Request) -> Response:
        caller = self.admin.caller(request)
        body = parse_body(_UnloadBody, await request.body())
        if not body.lora_name:
            return _error_response("'lora_name' needs to be provided to unload a LoRA adapter.")
        try:
            await self.admin.control.retire(body.lora_name, Audit(caller, _REASON.format("unload_lora_adapter")))
        except UnknownModel:
            message = f"The lora adapter '{body.lora_name}' cannot be found."
            return _error_response(message, "NotFoundError", HTTPStatus.NOT_FOUND)
        return Response(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    async def _is_served(self, name: str) -> bool:
        catalogue = await asyncio.to_thread(self.admin.control.log.read)
        return catalogue.resolve(RequestedModel(name)) is not None


def _error_response(
    message: str, kind: str = "InvalidUserInput", status: HTTPStatus = HTTPStatus.BAD_REQUEST
) -> JSONResponse:
    """An error in vLLM's form: `code` is the HTTP status."""
    return JSONResponse(
        {"error": {"message": message, "type": kind, "param": None, "code": status.value}}, status_code=status
    )
