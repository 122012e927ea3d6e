"""The admin API: publish a revision, retire an adapter, see what every replica holds. Behind a bearer token, always."""

from __future__ import annotations

import hmac
from dataclasses import dataclass

from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from convert.artifact import problems_of
from serve.admission import objections
from serve.candidate import Candidate
from serve.catalogue import CatalogueLog
from serve.config import EngineSettings
from serve.errors import AdapterRejected, InvalidBody, Unauthorized
from serve.publish import Replicas, publish, retire
from serve.state import sha256
from serve.store import AdapterStore


@dataclass(frozen=True)
class Admin:
    """The endpoints. Whichever replica gets the call coordinates all of them."""

    token_sha256: str
    engine: EngineSettings
    log: CatalogueLog
    store: AdapterStore
    replicas: Replicas

    async def publish(self, request: Request) -> Response:
        """POST /admin/v1/adapters with a Candidate whose files are in the store already."""
        self._authorize(request)
        candidate = _parse(await request.body())
        if found := objections(candidate, self.engine):
            raise AdapterRejected(f"{candidate.adapter} can't be served here: {'; '.join(found)}.")
        self.store.path(candidate.adapter)
        published = await publish(self.log, self.replicas, candidate)
        return JSONResponse(published.model_dump())

    async def retire(self, request: Request) -> Response:
        """DELETE /admin/v1/adapters/NAME."""
        self._authorize(request)
        name = request.path_params["name"]
        reports = await retire(self.log, self.replicas, name)
        return JSONResponse({"model": name, "replicas": len(reports)})

    async def list_replicas(self, request: Request) -> Response:
        """GET /admin/v1/replicas: every replica follows the catalogue and says what its engine holds."""
        self._authorize(request)
        reports = await self.replicas.sync()
        return JSONResponse({"replicas": [report.model_dump() for report in reports]})

    def _authorize(self, request: Request) -> None:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if not (hmac.compare_digest(sha256(token), self.token_sha256) and scheme.lower() == "bearer"):
            raise Unauthorized


def _parse(body: bytes) -> Candidate:
    try:
        return Candidate.model_validate_json(body)
    except ValidationError as error:
        raise InvalidBody(f"The body must be an adapter candidate: {problems_of(error)}.") from error
