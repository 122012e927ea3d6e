"""The admin API: every change of the catalogue, and what it and the replicas say. Behind a bearer token, always."""

from __future__ import annotations

import asyncio
import hmac
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from convert.artifact import Name, problems_of
from serve.admission import Admission
from serve.caller import key_of
from serve.candidate import Candidate
from serve.config import AdmissionSettings, EngineSettings
from serve.entry import CALLER_HEADER, Cause
from serve.errors import AdapterRejected, ArtifactRefused, InvalidBody, Unauthorized, UnknownModel
from serve.intake import take_path
from serve.names import AdapterRevision
from serve.publish import Control
from serve.rollout import begin, end
from serve.split import KINDS, Kind, Terms
from serve.state import sha256
from serve.store import AdapterStore
from serve.views import listed, shown, told

_NOT_IN_A_CALLER = re.compile(r"[^\w.@+-]")
_MOST_HISTORY = 1000


class _Body(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PublishBody(_Body):
    """A candidate whose files are in the store already, or a path on the server's machine."""

    candidate: Candidate | None = None
    path: Path | None = None
    name: Name | None = Field(default=None, description="With `path`: publish under this name.")
    stage_only: bool = False
    reason: str = Field(default="", max_length=500)


class RevisionBody(_Body):
    """Which revision of the name in the path."""

    revision: str | None = Field(default=None, pattern=r"^[0-9a-f]{12,64}$", description="Its digest or how it begins.")
    reason: str = Field(default="", max_length=500)


class SplitBody(Terms):
    """Which revision gets a share, and on what terms."""

    revision: str = Field(pattern=r"^[0-9a-f]{12,64}$", description="Its digest or how it begins.")
    reason: str = Field(default="", max_length=500)

    @property
    def terms(self) -> Terms:
        return Terms(**self.model_dump(exclude={"revision", "reason"}))


_Document = TypeVar("_Document", bound=BaseModel)


@dataclass(frozen=True)
class Admin:
    """The endpoints. Whichever replica gets the call coordinates all of them."""

    tokens: Mapping[str, str]  # label → SHA-256
    engine: EngineSettings
    settings: AdmissionSettings
    admission: Admission
    store: AdapterStore
    control: Control

    def routes(self) -> list[Route]:
        adapters, one = "/admin/v1/adapters", "/admin/v1/adapters/{name}"
        return [
            Route(adapters, self.list_adapters, methods=["GET"]),
            Route(adapters, self.publish, methods=["POST"]),
            Route(one, self.show, methods=["GET"]),
            Route(one, self.retire, methods=["DELETE"]),
            Route(f"{one}/history", self.history, methods=["GET"]),
            Route("/admin/v1/history", self.history, methods=["GET"]),
            *(Route(f"{one}/{verb}", self.change, methods=["POST"]) for verb in _VERBS),
            *(Route(f"{one}/{kind}", self.begin_split, methods=["POST"]) for kind in KINDS),
            *(Route(f"{one}/{kind}", self.end_split, methods=["DELETE"]) for kind in KINDS),
            Route("/admin/v1/replicas", self.list_replicas, methods=["GET"]),
        ]

    async def publish(self, request: Request) -> Response:
        """Check an adapter, have every replica hold and prove it, and move the alias unless it is only staged."""
        caller = self.caller(request)
        body = await _parse(PublishBody, request)
        candidate = await self.admit(body)
        act = self.control.stage if body.stage_only else self.control.publish
        return JSONResponse((await act(candidate, Cause(caller, body.reason))).model_dump())

    async def admit(self, body: PublishBody) -> Candidate:
        """The candidate, its files in the store and found good. Raises AdapterRejected, or PathRefused."""
        if (body.candidate is None) == (body.path is None):
            raise InvalidBody("The body must hold either `candidate` or `path`.")
        candidate = body.candidate
        if candidate is None and body.path:
            try:
                candidate = await asyncio.to_thread(
                    take_path, body.path, body.name, self.store, self.engine, self.settings
                )
            except ArtifactRefused as error:
                raise AdapterRejected(str(error)) from error
        assert candidate is not None
        files = await asyncio.to_thread(self.store.path, candidate.adapter)
        await asyncio.to_thread(self.admission.check, candidate, files)
        return candidate

    async def change(self, request: Request) -> Response:
        """promote, rollback, pin, unpin or abandon a revision of a name."""
        cause_by = self.caller(request)
        body = await _parse(RevisionBody, request)
        name, verb = request.path_params["name"], request.url.path.rpartition("/")[2]
        return await _VERBS[verb](self.control, name, body.revision, Cause(cause_by, body.reason))

    async def retire(self, request: Request) -> Response:
        name, reason = request.path_params["name"], request.query_params.get("reason", "")[:500]
        reports = await self.control.retire(name, Cause(self.caller(request), reason))
        return JSONResponse({"model": name, "replicas": len(reports)})

    async def begin_split(self, request: Request) -> Response:
        """canary or shadow: a revision that is known gets a share of the traffic of its name."""
        caller = self.caller(request)
        name, kind = request.path_params["name"], _split_kind(request)
        body = await _parse(SplitBody, request)
        reports = await begin(self.control, name, body.revision, kind, body.terms, Cause(caller, body.reason))
        return JSONResponse({"model": name, kind: body.revision, "share": body.share, "replicas": len(reports)})

    async def end_split(self, request: Request) -> Response:
        caller = self.caller(request)
        name, kind = request.path_params["name"], _split_kind(request)
        reason = request.query_params.get("reason", f"The {kind} was ended.")[:500]
        reports = await end(self.control, name, kind, Cause(caller, reason))
        return JSONResponse({"model": name, "ended": kind, "replicas": len(reports)})

    async def give_up(self, canary: AdapterRevision, reason: str) -> None:
        """End a canary that has shown to be worse. Raises as `end` does."""
        await end(self.control, canary.name, "canary", Cause("graft", reason), canary.revision)

    async def list_adapters(self, request: Request) -> Response:
        self.caller(request)
        catalogue = await asyncio.to_thread(self.control.log.read)
        return JSONResponse({"epoch": catalogue.epoch, "adapters": listed(catalogue)})

    async def show(self, request: Request) -> Response:
        self.caller(request)
        name = request.path_params["name"]
        catalogue = await asyncio.to_thread(self.control.log.read)
        if name not in catalogue.adapters:
            raise UnknownModel(name, catalogue.adapters)
        return JSONResponse(shown(name, catalogue.adapters[name]))

    async def history(self, request: Request) -> Response:
        """What was done, by whom, when and why; newest first."""
        self.caller(request)
        limit = request.query_params.get("limit", "100")
        if not limit.isascii() or not limit.isdigit() or int(limit) > _MOST_HISTORY:
            raise InvalidBody(f"`limit` must be a number up to {_MOST_HISTORY}.")
        name = request.path_params.get("name")
        entries = await asyncio.to_thread(self.control.log.history, name, int(limit))
        return JSONResponse({"history": told(entries)})

    async def list_replicas(self, request: Request) -> Response:
        """Every replica follows the catalogue and says what its engine holds."""
        self.caller(request)
        reports = await self.control.replicas.sync()
        return JSONResponse({"replicas": [report.model_dump() for report in reports]})

    def caller(self, request: Request) -> str:
        """Who asks: the label of the token or the id of a key that may, and what the caller says of itself. Raises
        Unauthorized."""
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        digest = sha256(token)
        labels = [label for label, known in self.tokens.items() if hmac.compare_digest(digest, known)]
        if scheme.lower() != "bearer":
            labels = []
        if not labels and (key := key_of(request.scope)) is not None and key.admin:
            labels = [key.id]
        if not labels:
            raise Unauthorized
        told_by = _NOT_IN_A_CALLER.sub("", request.headers.get(CALLER_HEADER, ""))[:64]
        return f"{labels[0]}/{told_by}" if told_by else labels[0]


async def _promote(control: Control, name: str, revision: str | None, cause: Cause) -> Response:
    return JSONResponse((await control.promote(name, _required(revision), cause)).model_dump())


async def _roll_back(control: Control, name: str, revision: str | None, cause: Cause) -> Response:
    return JSONResponse((await control.roll_back(name, revision, cause)).model_dump())


async def _abandon(control: Control, name: str, revision: str | None, cause: Cause) -> Response:
    reports = await control.abandon(name, _required(revision), cause)
    return JSONResponse({"model": name, "replicas": len(reports)})


async def _pin(control: Control, name: str, revision: str | None, cause: Cause) -> Response:
    return JSONResponse({"model": name, "revision": str(await control.pin(name, revision, cause)), "pinned": True})


async def _unpin(control: Control, name: str, revision: str | None, cause: Cause) -> Response:
    return JSONResponse({"model": name, "revision": str(await control.unpin(name, revision, cause)), "pinned": False})


_VERBS = {"promote": _promote, "rollback": _roll_back, "abandon": _abandon, "pin": _pin, "unpin": _unpin}


def _split_kind(request: Request) -> Kind:
    last = request.url.path.rpartition("/")[2]
    return next(kind for kind in KINDS if kind == last)


def _required(revision: str | None) -> str:
    if revision is None:
        raise InvalidBody("`revision` must say which revision: 12 or more digits of its digest.")
    return revision


async def _parse(kind: type[_Document], request: Request) -> _Document:
    try:
        return kind.model_validate_json(await request.body() or b"{}")
    except ValidationError as error:
        raise InvalidBody(f"The body does not fit: {problems_of(error)}.") from error
