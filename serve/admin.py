"""The admin API: publish a revision, retire an adapter, see what every replica holds. Behind a bearer token, always."""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from convert.artifact import problems_of
from serve.admission import objections
from serve.candidate import Candidate
from serve.catalogue import CatalogueLog
from serve.config import EngineSettings
from serve.errors import AdapterRejected, InvalidBody, Unauthorized
from serve.names import AdapterRevision
from serve.publish import Replicas, publish, retire
from serve.rollout import begin, end
from serve.split import KINDS, Kind, Terms
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

    async def begin_split(self, request: Request) -> Response:
        """POST /admin/v1/adapters/NAME/canary or …/shadow with a revision that is known, and its terms."""
        self._authorize(request)
        name, kind = request.path_params["name"], _kind(request)
        asked = _parse_split(await request.body())
        terms = Terms(**asked.model_dump(exclude={"revision"}))
        reports = await begin(self.log, self.replicas, name, asked.revision, kind, terms)
        return JSONResponse({"model": name, kind: asked.revision, "share": terms.share, "replicas": len(reports)})

    async def end_split(self, request: Request) -> Response:
        """DELETE /admin/v1/adapters/NAME/canary or …/shadow."""
        self._authorize(request)
        name, kind = request.path_params["name"], _kind(request)
        reports = await end(self.log, self.replicas, name, kind, "Ended by the admin API.")
        return JSONResponse({"model": name, "ended": kind, "replicas": len(reports)})

    async def give_up(self, canary: AdapterRevision, reason: str) -> None:
        """End a canary that has shown to be worse. Raises as `end` does."""
        await end(self.log, self.replicas, canary.name, "canary", reason, canary.revision)

    async def list_replicas(self, request: Request) -> Response:
        """GET /admin/v1/replicas: every replica follows the catalogue and says what its engine holds."""
        self._authorize(request)
        reports = await self.replicas.sync()
        return JSONResponse({"replicas": [report.model_dump() for report in reports]})

    def _authorize(self, request: Request) -> None:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if not (hmac.compare_digest(sha256(token), self.token_sha256) and scheme.lower() == "bearer"):
            raise Unauthorized


class AskedSplit(Terms):
    """The body of a canary or shadow."""

    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{12,64}$")]


def _kind(request: Request) -> Kind:
    last = request.url.path.rpartition("/")[2]
    return next(kind for kind in KINDS if kind == last)


def _parse_split(body: bytes) -> AskedSplit:
    try:
        return AskedSplit.model_validate_json(body)
    except ValidationError as error:
        raise InvalidBody(f"The body must be a revision and its terms: {problems_of(error)}.") from error


def _parse(body: bytes) -> Candidate:
    try:
        return Candidate.model_validate_json(body)
    except ValidationError as error:
        raise InvalidBody(f"The body must be an adapter candidate: {problems_of(error)}.") from error
